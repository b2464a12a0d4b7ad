"""What a feature plan means step by step: a pure function of the plan.

A feature counts as computed at a step when the modules it spans are called.  So it does not where
an entry names it, nor inside or across the ends of a wider one; parts within it may be taken from
the cache.  Features never cross to another denoiser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cacheplan.errors import UnsupportedError
from cacheplan.plans.compute import experts, needed
from cacheplan.plans.forecast import weights
from cacheplan.plans.rules import RANGES
from cacheplan.plans.words import site_words
from cacheplan.types import DiffusionSpec, FeatureAction, FeaturePlan, FeatureSite

WHOLE = ("hidden", "model")  # parts that stand for all blocks of whichever denoiser runs


@dataclass(frozen=True)
class Program:
    """The plan, unrolled.

    `last_use` has, per site and step, the last step that may combine the feature computed then,
    or 0.  A gate adds computed steps, which can only make older features obsolete sooner.
    """

    spec: DiffusionSpec
    sites: tuple[FeatureSite, ...]
    actions: tuple[Mapping[FeatureSite, FeatureAction], ...]  # per step, what is not computed
    last_use: Mapping[FeatureSite, tuple[int, ...]]
    most: Mapping[FeatureSite, int]  # features that are combined at once

    def computed(self, site: FeatureSite, step: int, *, promoted: bool = False) -> bool:
        """Whether the feature is computed at the step, by the plan or because a gate promoted."""
        here = self.runs(site, step)
        return here and (promoted or not _hidden_by(site, self.actions[step]))

    def stores(self, step: int, *, promoted: bool = False) -> tuple[FeatureSite, ...]:
        """The features that are computed at the step and needed later."""
        return tuple(
            site
            for site in self.sites
            if self.last_use[site][step] and self.computed(site, step, promoted=promoted)
        )

    def runs(self, site: FeatureSite, step: int) -> bool:
        """Whether the site is in the denoiser that runs at the step."""
        blocks = blocks_at(self.spec, step)
        return site.part in WHOLE or (site.first in blocks and site.last - 1 in blocks)

    def weights(self, action: FeatureAction, step: int, keys: Sequence[int]) -> tuple[float, ...]:
        """What the features computed at `keys`, newest first, count at the step."""
        found = action.weights or weights(action.basis, action.order, keys, step, self.spec.sigmas)
        return tuple(action.scale * weight for weight in found)


def expert(spec: DiffusionSpec, step: int) -> int:
    """Which denoiser runs at the step."""
    return sum(start <= step for start in spec.expert_starts)


def blocks_at(spec: DiffusionSpec, step: int) -> range:
    """The blocks of the denoiser that runs at the step."""
    found = experts(spec)
    index = min(expert(spec, step), len(found) - 1)
    first = sum(len(blocks) for blocks in found[:index])
    return range(first, first + len(found[index]))


def unroll(plan: FeaturePlan) -> Program:
    """The program of a plan; UnsupportedError where its entries cannot be followed."""
    spec = plan.model
    actions: list[dict[FeatureSite, FeatureAction]] = [{} for _ in range(spec.steps)]
    for entry in plan.entries:
        actions[entry.step][entry.site] = entry.action
    sites = tuple(dict.fromkeys(entry.site for entry in plan.entries))
    most = {site: max(needed(found[site]) for found in actions if site in found) for site in sites}
    program = Program(spec, sites, tuple(actions), {}, most)
    last_use = {site: _last_use(program, site) for site in sites}
    return Program(spec, sites, program.actions, last_use, most)


def _last_use(program: Program, site: FeatureSite) -> tuple[int, ...]:
    spec = program.spec
    last = [0] * spec.steps
    for step, found in enumerate(program.actions):
        action = found.get(site)
        if action is None:
            continue
        if not program.runs(site, step):
            raise UnsupportedError(
                f"The plan leaves out {site_words(site)} at step {step}, where another denoiser "
                "runs: plan only blocks of the denoiser that runs at the step."
            )
        count = needed(action)
        at, keys = step, 0
        while keys < count and at > _start(spec, step):
            at -= 1
            last[at] = step
            keys += program.computed(site, at)
        if keys < len(action.weights):
            raise UnsupportedError(
                f"The plan combines {len(action.weights)} features of {site_words(site)} at step "
                f"{step}, but only {keys} have been computed by then: give it fewer weights."
            )
    return tuple(last)


def _start(spec: DiffusionSpec, step: int) -> int:
    """The first step of the denoiser that runs at `step`."""
    return max((start for start in spec.expert_starts if start <= step), default=0)


def _hidden_by(site: FeatureSite, left_out: Mapping[FeatureSite, FeatureAction]) -> bool:
    """Whether one of the features that are not computed is the site, or spans part of it."""
    return any(
        other == site
        or (
            other.part in RANGES
            and _overlap(site, other)
            and not (_inside(other, site) and not _inside(site, other))
        )
        for other in left_out
    )


def _overlap(a: FeatureSite, b: FeatureSite) -> bool:
    return a.first < b.last and b.first < a.last


def _inside(a: FeatureSite, b: FeatureSite) -> bool:
    return b.first <= a.first and a.last <= b.last
