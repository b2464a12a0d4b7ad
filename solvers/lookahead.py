"""Skip as far as the change at the far end allows (SmoothCache)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from cacheplan.solvers.fitting import Fitted, fit, greedy, needed
from cacheplan.solvers.schedule import Mask, checked_schedule
from cacheplan.types.problem import Schedule, Solution


@dataclass(frozen=True)
class LookAhead:
    """From each computed step skip the most steps, at most `ahead`, whose last changed little.

    SmoothCache (Liu et al. 2024, arXiv 2411.10510): steps `i + 1 .. i + lag` are skipped for the
    largest lag with `change[i, i + lag] <= threshold`; steps between are not looked at.  The
    authors set the threshold by hand and force the first and the last step; here the last step
    is forced where the problem says so.  `threshold=None` spends the budget.
    """

    threshold: float | None = None
    ahead: int = 3

    def __call__(self, problem: Schedule) -> Solution:
        problem = checked_schedule(problem)
        return greedy(problem, partial(self.rule, problem), self.threshold, "SmoothCache")

    def fit(self, problem: Schedule) -> Fitted:
        """The schedule and the threshold that spend the budget."""
        problem = checked_schedule(problem)
        return fit(problem, partial(self.rule, problem))

    def rule(self, problem: Schedule, threshold: float) -> Mask:
        """Which steps a threshold computes, `[S, T]`."""
        change = needed(problem.change, "change")
        small = np.isfinite(change) & (change <= threshold)
        return np.stack([_scan(site, self.ahead) for site in small]) | problem.forced


def _scan(small: Mask, ahead: int) -> Mask:
    """One site: `small[i, t]` says that step `t` is close to step `i`."""
    T = len(small)
    computed = np.zeros(T, dtype=np.bool_)
    step = 0
    while step < T:
        computed[step] = True
        close = np.flatnonzero(small[step, step + 1 : step + 1 + ahead])
        step += 1 + (int(close[-1]) + 1 if close.size else 0)
    return computed
