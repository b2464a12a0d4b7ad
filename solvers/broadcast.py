"""Compute at even intervals within the free steps, each site at its own (PAB)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cacheplan.solvers.fitting import fit
from cacheplan.solvers.schedule import Mask, checked_schedule, solution
from cacheplan.types.problem import Schedule, Solution


@dataclass(frozen=True)
class Broadcast:
    """From the first free step on, compute every `range`-th step and serve the others from it.

    Pyramid Attention Broadcast (Zhao et al. 2024, arXiv 2408.12588): attention of a kind that
    changes less is broadcast to more steps.  The authors set the `ranges` `[S]` by hand; here
    they keep their proportions and grow together until the budget is met.
    """

    ranges: tuple[int, ...]

    def __call__(self, problem: Schedule) -> Solution:
        problem = checked_schedule(problem)
        fitted = fit(problem, lambda factor: self.rule(problem, factor))
        found = " and ".join(map(str, self.intervals(problem, fitted.threshold)))
        return solution(problem, fitted.computed, f"Broadcast to stretches of {found} steps.")

    def intervals(self, problem: Schedule, factor: float) -> list[int]:
        """Steps that one computation of each site serves, itself included."""
        most = problem.forced.shape[1]
        return [max(1, math.floor(min(factor * r, most) + 1e-9)) for r in self.ranges]

    def rule(self, problem: Schedule, factor: float) -> Mask:
        """Which steps are computed where all ranges are multiplied with `factor`, `[S, T]`."""
        computed = problem.forced.copy()
        for row, interval in zip(computed, self.intervals(problem, factor), strict=True):
            free = np.flatnonzero(~row)
            row[free[::interval]] = True
        return computed
