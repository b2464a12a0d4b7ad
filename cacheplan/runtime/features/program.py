"""What a feature plan means step by step: a pure function of the plan.

A feature counts as computed at a step when all blocks it spans are called, though parts within
them may be taken from the cache.  Features never cross to another denoiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from cacheplan.errors import UnsupportedError
from cacheplan.plans.compute import experts, first_steps, needed
from cacheplan.plans.forecast import weights
from cacheplan.plans.rules import RANGES
from cacheplan.plans.words import site_words
from cacheplan.types import FeatureAction, FeaturePlan, FeatureSite

WHOLE = ("hidden", "model")  # parts that stand for all blocks of whichever denoiser runs

_weights = lru_cache(maxsize=4096)(weights)  # the same for all sites and runs


class Program:
    """A plan, unrolled; UnsupportedError where its entries cannot be followed.

    `last_use` has, per site and step, the last step that may combine the feature computed then,
    or 0.  A gate adds computed steps, which can only make older features obsolete sooner.
    """

    def __init__(self, plan: FeaturePlan) -> None:
        self.spec = spec = plan.model
        self.text_once, self.first_steps = plan.text_once, first_steps(spec)
        self.sites = tuple(dict.fromkeys(entry.site for entry in plan.entries))
        self.actions: list[dict[FeatureSite, FeatureAction]] = [{} for _ in range(spec.steps)]
        for entry in plan.entries:
            self.actions[entry.step][entry.site] = entry.action
        self.experts = [
            sum(start <= step for start in spec.expert_starts) for step in range(spec.steps)
        ]
        self.ranges: list[range] = []  # of blocks, per denoiser
        for blocks in experts(spec):
            first = self.ranges[-1].stop if self.ranges else 0
            self.ranges.append(range(first, first + len(blocks)))
        self._wide = [  # blocks that are left out
            [self.span(site, step) for site in found if site.part in RANGES]
            for step, found in enumerate(self.actions)
        ]
        self.most = dict.fromkeys(self.sites, 0)  # features that are combined at once
        for entry in plan.entries:
            self.most[entry.site] = max(self.most[entry.site], needed(entry.action))
        self.last_use = {site: self._last_use(site) for site in self.sites}
        self._stores = {
            (step, promoted): tuple(
                site
                for site in self.sites
                if self.last_use[site][step] and self.computed(site, step, promoted=promoted)
            )
            for step in range(spec.steps)
            for promoted in (False, True)
        }

    def blocks(self, step: int) -> range:
        """The blocks of the denoiser that runs at the step."""
        return self.ranges[min(self.experts[step], len(self.ranges) - 1)]

    def span(self, site: FeatureSite, step: int) -> range:
        """The blocks that the site stands for at the step."""
        return self.blocks(step) if site.part in WHOLE else range(site.first, site.last)

    def runs(self, site: FeatureSite, step: int) -> bool:
        """Whether the site is in the denoiser that runs at the step."""
        span, blocks = self.span(site, step), self.blocks(step)
        return span.start in blocks and span.stop - 1 in blocks

    def computed(self, site: FeatureSite, step: int, *, promoted: bool = False) -> bool:
        """Whether the feature is computed at the step, by the plan or because a gate promoted."""
        if not self.runs(site, step):
            return False
        if promoted:
            return True
        span = self.span(site, step)
        return site not in self.actions[step] and not any(
            wide.start < span.stop and span.start < wide.stop for wide in self._wide[step]
        )

    def stores(self, step: int, *, promoted: bool) -> tuple[FeatureSite, ...]:
        """The features that are computed at the step and needed later."""
        return self._stores[step, promoted]

    def weights(self, action: FeatureAction, step: int, keys: Sequence[int]) -> tuple[float, ...]:
        """What the features computed at `keys`, newest first, count at the step."""
        sigmas = self.spec.sigmas
        found = action.weights or _weights(action.basis, action.order, tuple(keys), step, sigmas)
        return tuple(action.scale * weight for weight in found)

    def _last_use(self, site: FeatureSite) -> list[int]:
        last = [0] * self.spec.steps
        for step, found in enumerate(self.actions):
            action = found.get(site)
            if action is None:
                continue
            if not self.runs(site, step):
                raise UnsupportedError(
                    f"The plan leaves out {site_words(site)} at step {step}, where another "
                    "denoiser runs: plan only blocks of the denoiser that runs at the step."
                )
            first = max((s for s in self.spec.expert_starts if s <= step), default=0)
            at, keys = step, 0
            while keys < needed(action) and at > first:
                at -= 1
                last[at] = step
                keys += self.computed(site, at)
            if keys < len(action.weights):
                raise UnsupportedError(
                    f"The plan combines {len(action.weights)} features of {site_words(site)} at "
                    f"step {step}, but only {keys} have been computed by then: give it fewer "
                    "weights."
                )
        return last
