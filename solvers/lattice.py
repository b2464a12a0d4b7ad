"""Find the unit of which rates are multiples: it sharpens bounds and makes counting exact."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cacheplan.solvers.feasible import SLACK
from cacheplan.types.problem import Floats, Knapsack

_FINEST = 1e-6  # of the largest number: finer lattices are as good as none
_ZERO = 1e-9  # of the largest number: remainders below are rounding
_EXACT = 1e-12  # of the largest number: how near to multiples the numbers must be
_ROUNDING = 1e-8  # of a unit


def common_unit(numbers: Floats) -> float:
    """The largest unit of which all `numbers >= 0` are multiples up to rounding; 0 if none is.

    Euclid's algorithm on all numbers at once: the smallest is the unit until remainders, taken
    to the nearest multiple, are left.  Keep fractions of equal sites have such a unit, and so
    have bytes; measured times have none.
    """
    left = np.unique(numbers[numbers > 0])
    if not left.size:
        return 0.0
    largest = float(left[-1])
    while left.size:
        unit = float(left[0])
        if unit < _FINEST * largest:
            return 0.0
        remainder = np.remainder(left, unit)
        remainder = np.minimum(remainder, unit - remainder)
        left = np.unique(remainder[remainder > _ZERO * largest])
        left = np.append(left, unit) if left.size else left
    unit = largest / round(largest / unit)  # remainders of remainders have lost digits
    strays = np.abs(numbers - unit * np.rint(numbers / unit)).max()
    return unit if strays <= _EXACT * largest else 0.0


def narrow(problem: Knapsack, allowed: NDArray[np.bool_]) -> Knapsack:
    """The problem with only the `allowed` options, and of its budget only what they can spend.

    `allowed` `[sites, options]` must hold a feasible choice; options that leave too little for
    the cheapest of the other sites go too.  What is left of the budget below the common unit of
    all steps from the cheapest options is out of reach.
    """
    least = problem.rate.min(1, where=allowed, initial=np.inf)
    spent = math.fsum(least)
    spare = max(problem.budget - spent, 0.0)
    extra = problem.rate - least[:, None]
    allowed = allowed & (extra <= spare + SLACK * problem.budget)
    extra = np.where(allowed, extra, 0.0)
    spare = min(spare, math.fsum(extra.max(1)))
    if unit := common_unit(extra):
        spare = unit * math.floor(spare / unit + _ROUNDING)
    budget = min(problem.budget, (spent + spare) * (1 + SLACK))
    return Knapsack(least[:, None] + extra, np.where(allowed, problem.distortion, np.inf), budget)
