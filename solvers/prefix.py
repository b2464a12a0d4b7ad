"""Retain the same share of mass at every site (PrefixKV)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cacheplan.solvers.certify import retained
from cacheplan.solvers.feasible import checked_curves
from cacheplan.solvers.marginal import add_best
from cacheplan.types.problem import Floats, Integers, Solution, Split


@dataclass(frozen=True)
class Prefix:
    """`max min_l C_l(x_l)`: the largest common threshold on retained mass that the total buys.

    PrefixKV (Wang et al. 2024, arXiv 2412.03409): each site takes the shortest prefix of its
    sorted mass that reaches `theta`, and `theta` is found by binary search.  The authors stop
    within 5 tokens and rescale; here the search ends at neighbouring floats, and units left over
    where several sites step at once go where the next mass is largest.
    """

    def __call__(self, problem: Split) -> Solution:
        curves = checked_curves(problem)
        low, high = 0.0, max(float(curve[-1]) for curve in curves)
        if shortest(curves, problem.lower, high).sum() <= problem.total:
            low = high
        while low < (theta := (low + high) / 2) < high:
            if shortest(curves, problem.lower, theta).sum() <= problem.total:
                low = theta
            else:
                high = theta
        return _finish(problem, curves, low)


@dataclass(frozen=True)
class PrefixWalk:
    """The same threshold without a search, as a reference.

    Walking up the breakpoints of all curves, one more unit is needed behind each: the total is
    spent at the breakpoint of that rank, which is one order statistic.
    """

    def __call__(self, problem: Split) -> Solution:
        curves = checked_curves(problem)
        spare = problem.total - int(problem.lower.sum())
        steps = [curve[low:-1] for curve, low in zip(curves, problem.lower, strict=True)]
        end = max(float(curve[-1]) for curve in curves)
        breakpoints = np.sort(np.concatenate([*steps, [end]]))
        return _finish(problem, curves, float(breakpoints[spare]))


def shortest(curves: Sequence[Floats], lower: Integers, theta: float) -> Integers:
    """Units `[sites]` at which each curve reaches `theta`, within the limits."""
    reached = [min(int(np.searchsorted(curve, theta)), len(curve) - 1) for curve in curves]
    return np.maximum(np.array(reached, dtype=np.int64), lower)


def _finish(problem: Split, curves: Sequence[Floats], theta: float) -> Solution:
    units = shortest(curves, problem.lower, theta)
    units = add_best(curves, units, problem.total - int(units.sum()))
    value = float(retained(problem, units).min())
    status = f"Optimal: no division retains more than {value:.4g} of the mass at every site."
    return Solution(units, float(problem.total), value, value, 0.0, status)
