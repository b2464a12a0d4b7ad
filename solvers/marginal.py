"""Retain the largest total mass: every unit goes where it adds most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cacheplan.errors import ProfileError
from cacheplan.solvers.certify import retained
from cacheplan.solvers.feasible import checked_curves
from cacheplan.types.problem import Floats, Integers, Solution, Split

_NOISE = 1e-9  # of a share: curves may be this far from concave by rounding


@dataclass(frozen=True)
class Marginal:
    """`max sum_l C_l(x_l)` subject to `sum x = total`, `lower <= x <= upper`.

    Marginal analysis is optimal for concave curves (Fox 1966, "Discrete optimization via
    marginal analysis", Management Science 13).  Raises ProfileError for a curve that is not
    concave between its limits.
    """

    def __call__(self, problem: Split) -> Solution:
        curves = checked_curves(problem)
        for site, (curve, low) in enumerate(zip(curves, problem.lower, strict=True)):
            if (np.diff(curve[low:], 2) > _NOISE).any():
                raise ProfileError(
                    f"The curve of site {site} is not concave, as the mass of sorted tokens is: "
                    "profile again."
                )
        units = add_best(curves, problem.lower, problem.total - int(problem.lower.sum()))
        value = float(retained(problem, units).sum())
        status = "Optimal: the curves are concave, so giving each unit where it adds most is best."
        return Solution(units, float(problem.total), value, value, 0.0, status)


def add_best(curves: Sequence[Floats], start: Integers, units: int) -> Integers:
    """Add `units` to `start` `[sites]`, each where the next mass is largest, ties to lower index.

    For concave curves the greedy order is the sorted order of all next masses; the running
    minimum keeps it so where rounding bends a curve.
    """
    masses = [
        np.minimum.accumulate(np.diff(curve[low:]))
        for curve, low in zip(curves, start, strict=True)
    ]
    owners = np.repeat(np.arange(len(masses)), [len(m) for m in masses])
    best = np.argsort(-np.concatenate([[], *masses]), kind="stable")[:units]
    return start + np.bincount(owners[best], minlength=len(masses))
