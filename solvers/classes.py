"""Which sites stay whole while the others share what is left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cacheplan.errors import InfeasibleError, InputError, ProfileError
from cacheplan.types.problem import Solution, TwoClasses


@dataclass(frozen=True)
class Classes:
    """The number of whole sites, and which, that minimise the cost of the others; exact.

    For a given number the cheapest sites to cut are cut, so trying every number finds the best.
    Ties: fewer whole sites, then lower indices cut first.
    """

    def __call__(self, problem: TwoClasses) -> Solution:
        cost = problem.cost
        sites = len(cost)
        if cost.ndim != 2 or cost.shape[1] != sites + 1 or not sites:
            raise InputError(
                f"The costs have shape {cost.shape}, expected [sites, sites + 1] with a site."
            )
        if np.isnan(cost).any() or (cost < 0).any():
            raise ProfileError(
                "The costs hold NaN or negative numbers: run `cacheplan profile` again."
            )
        ordered = np.sort(cost, axis=0)
        totals = [float(ordered[: sites - whole, whole].sum()) for whole in range(sites + 1)]
        if np.isinf(cost).all(0).all():
            raise InfeasibleError("No number of whole sites is within the budget.")
        usable = np.isfinite(cost).all(0)
        whole = int(np.argmin(np.where(usable, totals, np.inf)))
        choice = np.ones(sites, dtype=np.int64)
        choice[np.argsort(cost[:, whole], kind="stable")[: sites - whole]] = 0
        value = totals[whole]
        status = f"Optimal: every number of whole sites was tried; {whole} of {sites} stay whole."
        return Solution(choice, float(whole), value, value, 0.0, status)
