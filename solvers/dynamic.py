"""The knapsack by dynamic programming over quantised rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cacheplan.errors import InputError
from cacheplan.solvers.certify import certify
from cacheplan.solvers.feasible import checked_knapsack
from cacheplan.solvers.lagrangian import relax
from cacheplan.solvers.lattice import common_unit
from cacheplan.types.problem import Floats, Integers, Knapsack, Solution

_ROUNDING = 1e-8  # of a unit; over all sites far less than one


@dataclass(frozen=True)
class Dynamic:
    """`best[l, c] = min_o best[l - 1, c - w[l, o]] + d[l, o]` with rates `w` in whole units.

    With rates rounded up the budget holds; with rates rounded down the recursion bounds the
    optimum from below, and its choice, led back into the budget, may be the better one.  Only
    options that could still beat the Lagrangian choice take part, and only what they add to the
    site's cheapest such option is counted: few sites pay for the rounding.  Exact where rates are
    multiples of one unit, such as integers or keep fractions, and the budget is at most `units`.
    """

    units: int = 5000

    def __call__(self, problem: Knapsack) -> Solution:
        if self.units < 1:
            raise InputError(f"Dynamic programming has {self.units} units, expected at least 1.")
        problem = checked_knapsack(problem)
        relaxed = relax(problem)
        rate, distortion = relaxed.problem.rate, relaxed.problem.distortion
        extra = rate - rate.min(1, keepdims=True)
        spare = max(relaxed.problem.budget - math.fsum(rate.min(1)), 0.0)
        unit = common_unit(extra) if extra.any() else spare or 1.0
        exact = spare <= unit * (self.units + 0.5)
        if not exact:
            unit = spare / self.units
        counts = extra / unit
        counts = np.where(np.abs(counts - np.rint(counts)) < _ROUNDING, np.rint(counts), counts)
        capacity = round(spare / unit)
        within, _ = fill(distortion, np.ceil(counts), capacity)
        beyond, bound = fill(distortion, np.floor(counts), capacity)
        choice = relaxed.best(within, beyond)
        if exact:
            by = "dynamic programming, exact as the rates are multiples of one unit"
        elif bound > relaxed.bound:
            by = "dynamic programming with rates rounded down"
        else:
            by, bound = "the Lagrangian bound", relaxed.bound
        return certify(problem, choice, bound, by=by)


def fill(distortion: Floats, counts: Floats, capacity: int) -> tuple[Integers, float]:
    """The best choice `[sites]` with `sum of counts <= capacity`, and its distortion.

    `counts` are whole units, `[sites, options]`; options of infinite distortion are never chosen.
    Some choice must fit.
    """
    rows = np.arange(capacity + 1)
    best = np.zeros(capacity + 1)  # the distortion of the sites so far, for every capacity
    winners = []  # per site: the option chosen, for every capacity
    for costs, weights in zip(distortion, counts.astype(np.int64), strict=True):
        options = np.flatnonzero(np.isfinite(costs) & (weights <= capacity))
        left = rows - weights[options, None]  # [options, capacity + 1]
        candidates = np.where(left >= 0, best[left], np.inf) + costs[options, None]
        first = candidates.argmin(0)
        best = candidates[first, rows]
        winners.append(options[first])
    choice = np.zeros(len(winners), dtype=np.int64)
    left_over = capacity
    for site in reversed(range(len(winners))):
        choice[site] = winners[site][left_over]
        left_over -= int(counts[site, choice[site]])
    return choice, float(best[capacity])
