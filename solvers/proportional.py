"""Divide in proportion to weights, within limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cacheplan.errors import InputError, ProfileError
from cacheplan.solvers.certify import retained
from cacheplan.solvers.feasible import check_split
from cacheplan.solvers.rounding import largest_remainder
from cacheplan.types.problem import Floats, Integers, Solution, Split

_NEGLIGIBLE = 1e-12  # of the largest weight: such sites are filled after all others


@dataclass(frozen=True)
class Proportional:
    """`x = clip(c * weights, lower, upper)` with the one `c` that spends `total`, then rounded.

    The budget rule of CAKE (Qin et al. 2025, arXiv 2503.12491), whose step-by-step repair of
    clipped budgets it replaces by the exact water level.  Raises InputError without weights,
    ProfileError naming a site whose weight is unusable.
    """

    def __call__(self, problem: Split) -> Solution:
        check_split(problem)
        weights = problem.weights
        if weights is None or weights.shape != problem.lower.shape:
            raise InputError("Proportional division needs one weight for each site.")
        for site in np.flatnonzero(~(np.isfinite(weights) & (weights >= 0))):
            raise ProfileError(
                f"The weight of site {site} is {weights[site]}, expected a number of at least 0: "
                "profile again."
            )
        units = divide(problem, weights)
        value = float(retained(problem, units).sum())
        status = "Divided in proportion to the weights, within the limits of each site."
        return Solution(units, float(problem.total), value, None, None, status)


def divide(problem: Split, weights: Floats) -> Integers:
    """Units `[sites]` in proportion to `weights` `[sites]`, of a checked problem.

    The amount poured is piecewise linear in the level `c`, with corners where a site leaves its
    lower limit (`lower / weight`) or meets its upper one: interpolating between the corners
    inverts it exactly.
    """
    low, high = problem.lower, problem.upper
    weights = np.maximum(weights / (weights.max() or 1.0), _NEGLIGIBLE)
    levels = np.unique(np.concatenate([low / weights, high / weights]))
    poured = [np.clip(level * weights, low, high).sum() for level in levels]
    level = np.interp(problem.total, poured, levels)
    return largest_remainder(np.clip(level * weights, low, high), problem.total, low, high)
