"""Compute again once the change, or what is accumulated of it, reaches a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from cacheplan.solvers.fitting import Fitted, fit, greedy, needed
from cacheplan.solvers.schedule import Mask, checked_schedule
from cacheplan.types.problem import Schedule, Solution


@dataclass(frozen=True)
class Threshold:
    """Reuse step `t` iff `change[last computed, t] < threshold`.

    The offline policy of ERTACache (Peng et al. 2025, arXiv 2508.21091), whose authors set the
    threshold by hand.  `threshold=None` spends the budget.
    """

    threshold: float | None = None

    def __call__(self, problem: Schedule) -> Solution:
        problem = checked_schedule(problem)
        return greedy(problem, partial(self.rule, problem), self.threshold, "ERTACache")

    def fit(self, problem: Schedule) -> Fitted:
        """The schedule and the threshold that spend the budget."""
        problem = checked_schedule(problem)
        return fit(problem, partial(self.rule, problem))

    def rule(self, problem: Schedule, threshold: float) -> Mask:
        """Which steps a threshold computes, `[S, T]`."""
        change = needed(problem.change, "change")
        computed = problem.forced.copy()
        computed[:, 0] = True
        site, last = np.arange(len(computed)), np.zeros(len(computed), dtype=np.int64)
        for step in range(1, computed.shape[1]):
            computed[:, step] |= ~(change[site, last, step] < threshold)
            last = np.where(computed[:, step], step, last)
        return computed


@dataclass(frozen=True)
class Magnitude:
    """Skip while the accumulated deviation of the norms stays small, at most `consecutive` times.

    MagCache (Ma et al. 2025, arXiv 2506.09045): with the ratios `g_t` of residual norms, product
    `p` and sum `e` since the last computation, a step is skipped while `e += |1 - (p *= g_t)|` is
    within the threshold.  The first `retention` of the steps are computed.  The authors'
    repository rounds that share down and asks for `e < threshold`; diffusers rounds to nearest and
    asks for `e <= threshold`.  As ratios are a table, the online gate is this static schedule.
    `threshold=None` spends the budget.
    """

    threshold: float | None = None
    consecutive: int = 3
    retention: float = 0.2
    variant: Literal["diffusers", "repository"] = "diffusers"

    def __call__(self, problem: Schedule) -> Solution:
        problem = checked_schedule(problem)
        return greedy(problem, partial(self.rule, problem), self.threshold, "MagCache")

    def fit(self, problem: Schedule) -> Fitted:
        """The schedule and the threshold that spend the budget."""
        problem = checked_schedule(problem)
        return fit(problem, partial(self.rule, problem))

    def rule(self, problem: Schedule, threshold: float) -> Mask:
        """Which steps a threshold computes, `[S, T]`."""
        ratios = needed(problem.ratios, "ratios")
        S, T = ratios.shape
        diffusers = self.variant == "diffusers"
        warmup = int(self.retention * T + 0.5) if diffusers else int(T * self.retention)
        computed = problem.forced.copy()
        computed[:, : max(warmup, 1)] = True
        product, error, skipped = np.ones(S), np.zeros(S), np.zeros(S, dtype=np.int64)
        for step in range(max(warmup, 1), T):
            product, skipped = product * ratios[:, step], skipped + 1
            error = error + np.abs(1 - product)
            within = error <= threshold if diffusers else error < threshold
            computed[:, step] |= ~within | (skipped > self.consecutive)
            fresh = computed[:, step]
            product, error = np.where(fresh, 1.0, product), np.where(fresh, 0.0, error)
            skipped = np.where(fresh, 0, skipped)
        return computed
