"""How many FLOPs and how much memory a feature plan takes: the one place where it is computed."""

from __future__ import annotations

import math
import re
from itertools import accumulate, groupby, pairwise

from cacheplan.types import (
    Block,
    DiffusionSpec,
    FeatureAction,
    FeaturePlan,
    FeatureSite,
)


def full_flops(spec: DiffusionSpec) -> int:
    """FLOPs of the denoiser over all steps for one prompt, when everything is computed."""
    return spec.steps * spec.cost


def planned_flops(plan: FeaturePlan) -> int:
    """FLOPs of the denoiser over all steps for one prompt, when no gate computes more."""
    spec = plan.model
    return full_flops(spec) - sum(saved_flops(spec, e.site, e.step) for e in plan.entries)


def saved_flops(spec: DiffusionSpec, site: FeatureSite, step: int) -> int:
    """FLOPs of one prompt that are not spent when `site` is not computed at `step`."""
    if site.part == "model":
        return spec.cost
    if site.part == "hidden":
        running = experts(spec)
        index = sum(start <= step for start in spec.expert_starts)
        return sum(block.cost for block in running[min(index, len(running) - 1)])
    if site.part in ("delta", "branch"):
        return sum(block.cost for block in spec.blocks[site.first : site.last])
    return next(p.cost for p in spec.blocks[site.first].parts if p.name == site.part)


def planned_memory(plan: FeaturePlan, element_bytes: int) -> int:
    """Bytes of cached features for one prompt; their numbers take `element_bytes` bytes."""
    kept: dict[FeatureSite, int] = {}
    for entry in plan.entries:
        kept[entry.site] = max(kept.get(entry.site, 0), needed(entry.action))
    return element_bytes * sum(n * feature_size(plan.model, site) for site, n in kept.items())


def needed(action: FeatureAction) -> int:
    """How many computed features the action combines at most."""
    return 0 if action.do == "skip" else len(action.weights) or action.order + 1


def feature_size(spec: DiffusionSpec, site: FeatureSite) -> int:
    """Numbers one cached feature of `site` holds, for one prompt."""
    if site.part == "model":
        return math.prod(spec.latent) * spec.copies * len(spec.branches)
    if site.part in ("hidden", "branch"):  # what its last block hands on
        return spec.blocks[site.last - 1].size
    if site.part == "delta":
        return spec.blocks[site.first].size
    return next(p.size for p in spec.blocks[site.first].parts if p.name == site.part)


def experts(spec: DiffusionSpec) -> list[list[Block]]:
    """The blocks of each denoiser, in the order in which they take over; one if there is one."""
    if not spec.expert_starts:
        return [list(spec.blocks)]
    return [list(blocks) for _, blocks in groupby(spec.blocks, key=_denoiser)]


def expert_ranges(spec: DiffusionSpec) -> list[range]:
    """The indices of each denoiser's blocks."""
    ends = list(accumulate((len(blocks) for blocks in experts(spec)), initial=0))
    return [range(start, stop) for start, stop in pairwise(ends)]


def halves(blocks: range) -> tuple[FeatureSite, FeatureSite]:
    """The deltas of the first and of the last half of a denoiser's blocks."""
    half = len(blocks) // 2
    return (
        FeatureSite(part="delta", first=blocks.start, last=blocks.start + half),
        FeatureSite(part="delta", first=blocks.stop - half, last=blocks.stop),
    )


def _denoiser(block: Block) -> str:
    """The name of the denoiser at the start of the path; those of the first one have none."""
    found = re.match(r"(transformer|unet)_\d+(?=\.)", block.path)
    return found[0] if found else ""
