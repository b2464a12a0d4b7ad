"""From a choice to a Solution: its rate, its value, and how far from a proven bound it is."""

from __future__ import annotations

import math

import numpy as np

from cacheplan.solvers.feasible import SLACK
from cacheplan.types.problem import Floats, Integers, Knapsack, Solution, Split

OPTIMAL = 1e-4  # relative gap up to which a status says "Optimal"
_TINY = 1e-30
ROUNDING = 1e-13  # relative, of a sum of distortions
_SHOWN = 1e-6  # smaller gaps are rounding


def relative_gap(value: float, bound: float) -> float:
    """`|value - bound| / max(|bound|, tiny)`."""
    return abs(value - bound) / max(abs(bound), _TINY)


def percent(gap: float) -> str:
    """A gap in words: two digits, rounded up so that the claim stays true, at least 0.0001 %."""
    shown = 100 * max(gap, _SHOWN)
    unit = 10.0 ** (math.floor(math.log10(shown)) - 1)
    return f"{math.ceil(shown / unit - 1e-9) * unit:.6g} %"


def verdict(gap: float, by: str, optimal: float = OPTIMAL) -> str:
    """The status of a choice whose relative gap to the best is proven; optimal up to `optimal`."""
    if gap == 0:
        return f"Optimal: proven by {by}."
    if gap <= optimal:
        return f"Optimal: proven within {percent(gap)} by {by}."
    return f"Feasible: proven within {percent(gap)} of the best choice by {by}."


def picked(numbers: Floats, choice: Integers) -> float:
    """Sum over sites of `numbers[site, choice[site]]`, correctly rounded."""
    return math.fsum(numbers[np.arange(len(choice)), choice])


def certify(
    problem: Knapsack, choice: Integers, bound: float, *, by: str, optimal: float = OPTIMAL
) -> Solution:
    """The Solution of a checked problem; `by` names what has proven the bound.

    The bound is clipped to what is trivially true, `0 <= bound <= value`, and is the value where
    only rounding is between them.
    """
    rate, value = picked(problem.rate, choice), picked(problem.distortion, choice)
    assert rate <= problem.budget * (1 + SLACK), "a solver exceeded the budget"
    bound = min(max(bound, 0.0), value) if bound < value * (1 - ROUNDING) else value
    gap = relative_gap(value, bound)
    return Solution(choice, rate, value, bound, gap, verdict(gap, by, optimal))


def retained(problem: Split, units: Integers) -> Floats:
    """Share of mass that each site retains with `units`, `[sites]`; zeros without curves."""
    if problem.curves is None:
        return np.zeros(len(units))
    return np.array([curve[k] for curve, k in zip(problem.curves, units, strict=True)])
