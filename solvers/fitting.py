"""Greedy rules with a threshold: the threshold that spends a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cacheplan.errors import InputError, ProfileError
from cacheplan.solvers.schedule import Mask, affordable, rates, solution, too_small
from cacheplan.types.problem import Floats, Schedule, Solution

Rule = Callable[[float], Mask]  # threshold -> computed [S, T]; larger thresholds compute less

_CLOSE = 1e-9  # relative width at which the bisection ends
_NEGLIGIBLE = 1e-12  # relative changes below are rounding
_EVERYTHING = -1.0  # nothing changes by less


@dataclass(frozen=True, eq=False)
class Fitted:
    """Which steps are computed, `[S, T]`, and the threshold that says so."""

    computed: Mask
    threshold: float


def fit(problem: Schedule, rule: Rule) -> Fitted:
    """Bisect for the smallest threshold whose schedule is within the budget of a checked problem.

    The result is affordable, and a threshold smaller by the share `1e-9` is not.  A greedy rule
    may by chance compute more at a larger threshold; then there are several such places, and the
    bisection ends at one of them.
    """

    def fits(threshold: float) -> bool:
        return affordable(problem, math.fsum(rates(problem, rule(threshold))))

    if fits(_EVERYTHING):
        return Fitted(rule(_EVERYTHING), _EVERYTHING)
    if not fits(math.inf):
        smallest = math.fsum(rates(problem, rule(math.inf)))
        raise too_small(problem, smallest, "the sparsest schedule of this rule")
    low, high = 0.0, 1.0
    while not fits(high):
        low, high = high, high * 2
    while high - low > _CLOSE * high and high > _NEGLIGIBLE and high < math.inf:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return Fitted(rule(high), high)


def greedy(problem: Schedule, rule: Rule, threshold: float | None, name: str) -> Solution:
    """The Solution of a rule at `threshold`, or at the one that spends the budget."""
    if threshold is None:
        fitted, how = fit(problem, rule), "found by bisection"
    else:
        fitted, how = Fitted(rule(threshold), threshold), "as given"
        rate = math.fsum(rates(problem, fitted.computed))
        if not affordable(problem, rate):
            raise too_small(problem, rate, f"{name} with the threshold {threshold:g}")
    status = f"{name} with the threshold {fitted.threshold:.6g}, {how}."
    return solution(problem, fitted.computed, status)


def needed(numbers: Floats | None, name: str) -> Floats:
    """A field that a rule reads; raises InputError where the problem lacks it, NaN included."""
    if numbers is None:
        raise InputError(f'This rule needs the schedule\'s "{name}": profile again to measure it.')
    if np.isnan(numbers).any():
        raise ProfileError(f'The schedule\'s "{name}" holds NaN: profile again.')
    return numbers
