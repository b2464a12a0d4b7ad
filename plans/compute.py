"""How many FLOPs and how much memory a feature plan takes: the one place where it is computed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby, pairwise

from cacheplan.types import (
    Block,
    DiffusionSpec,
    FeatureAction,
    FeaturePlan,
    FeatureSite,
    Part,
    TextProjections,
)


def full_flops(spec: DiffusionSpec) -> int:
    """FLOPs of the denoiser over all steps for one prompt, when everything is computed."""
    return spec.steps * spec.cost


def planned_flops(plan: FeaturePlan) -> int:
    """FLOPs of the denoiser over all steps for one prompt, when no gate computes more."""
    spec, once = plan.model, plan.text_once
    computed = sum(step_flops(spec, step, text_once=once) for step in range(spec.steps))
    return computed - sum(saved_flops(spec, e.site, e.step, text_once=once) for e in plan.entries)


def step_flops(spec: DiffusionSpec, step: int, *, text_once: bool = False) -> int:
    """FLOPs of one prompt at a step of which nothing is left out.

    With `text_once`, as in plans, less the keys and values of the text but where they are new.
    """
    if not text_once or step in first_steps(spec):
        return spec.cost
    return spec.cost - _text_cost(running(spec, step))


def saved_flops(
    spec: DiffusionSpec, site: FeatureSite, step: int, *, text_once: bool = False
) -> int:
    """What is not spent of `step_flops` when `site` is not computed at `step`."""
    if site.part == "model":
        return step_flops(spec, step, text_once=text_once)
    left_out: Sequence[Block | Part]
    if site.part == "hidden":
        left_out = running(spec, step)
    elif site.part in ("delta", "branch"):
        left_out = spec.blocks[site.first : site.last]
    else:
        left_out = [p for p in spec.blocks[site.first].parts if p.name == site.part]
    saved = sum(module.cost for module in left_out)
    return saved - _text_cost(left_out) if text_once and step not in first_steps(spec) else saved


def planned_memory(plan: FeaturePlan, element_bytes: int) -> int:
    """Bytes of cached features for one prompt; their numbers take `element_bytes` bytes."""
    kept: dict[FeatureSite, int] = {}
    for entry in plan.entries:
        kept[entry.site] = max(kept.get(entry.site, 0), needed(entry.action))
    numbers = sum(n * feature_size(plan.model, site) for site, n in kept.items())
    if plan.text_once:
        numbers += max(_text_size(blocks) for blocks in experts(plan.model))
    return element_bytes * numbers


def text_parts(blocks: Iterable[Block]) -> list[tuple[Block, Part, TextProjections]]:
    """Where the blocks make keys and values of the text alone."""
    return [(b, part, part.text) for b in blocks for part in b.parts if part.text is not None]


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


def running(spec: DiffusionSpec, step: int) -> Sequence[Block]:
    """The blocks of the denoiser that runs at the step."""
    found = experts(spec)
    return found[min(sum(start <= step for start in spec.expert_starts), len(found) - 1)]


def first_steps(spec: DiffusionSpec) -> tuple[int, ...]:
    """The steps at which a denoiser begins to run."""
    return (0, *spec.expert_starts)


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


def _text_cost(modules: Sequence[Block | Part]) -> int:
    parts = [p for m in modules for p in (m.parts if isinstance(m, Block) else (m,))]
    return sum(part.text.cost for part in parts if part.text is not None)


def _text_size(blocks: Iterable[Block]) -> int:
    """Numbers that are kept of a text: all its keys and values, and once the text itself."""
    found = [text for _, _, text in text_parts(blocks)]
    return sum(text.size for text in found) + (found[0].given if found else 0)


def _denoiser(block: Block) -> str:
    """The name of the denoiser at the start of the path; those of the first one have none."""
    found = re.match(r"(transformer|unet)_\d+(?=\.)", block.path)
    return found[0] if found else ""
