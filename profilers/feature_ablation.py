"""What the final latent loses when a feature is held for one step alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cacheplan.adapters.loop import Loop
from cacheplan.adapters.sampling import Sampled
from cacheplan.types import DiffusionSpec, FeatureSite


@dataclass
class Hold:
    """Answers with a site's feature of the step before, at one step only (None: never)."""

    site: FeatureSite
    step: int | None = None
    loop: Loop | None = None
    _last: dict[str, list[Tensor]] = field(default_factory=dict)  # by branch

    def __call__(self, site: FeatureSite, found: list[Tensor]) -> list[Tensor] | None:
        if site != self.site:
            return None
        assert self.loop is not None
        before = self._last.get(self.loop.branch)
        self._last[self.loop.branch] = found
        return before if self.loop.step == self.step else None


def ablate(
    spec: DiffusionSpec,
    hold: Hold,
    run: Callable[[], Sampled],
    full: Tensor,
    *,
    tick: Callable[[int], None],
) -> NDArray[np.float64]:
    """`[T]`: squared error of the final latent relative to `full`, one run per step.

    `run` samples the prompt under taps that obey `hold`; steps only grow from run to run.  Steps
    at which nothing can be held, the first and those where another denoiser takes over, have 0.
    """
    errors = np.zeros(spec.steps)
    for step in range(1, spec.steps):
        if step not in spec.expert_starts:
            tick(step)
            hold.step = step
            errors[step] = relative_square(run().latent, full)
    hold.step = None
    return errors


def relative_square(found: Tensor, full: Tensor) -> float:
    """`|found - full|^2 / |full|^2`."""
    difference = (found.double() - full.double()).square().sum()
    return float(difference / full.double().square().sum())


def whole_site(spec: DiffusionSpec) -> FeatureSite:
    """The coarsest site that leaves the denoiser's ends fresh."""
    part = "branch" if any(b.path.startswith("up_blocks") for b in spec.blocks) else "hidden"
    if part == "hidden":
        return FeatureSite(part=part, first=0, last=len(spec.blocks))
    return FeatureSite(part=part, first=1, last=len(spec.blocks) - 1)
