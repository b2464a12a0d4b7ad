"""The knapsack by mixed-integer programming (HiGHS through scipy): the default of `planned`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cacheplan.solvers.certify import ROUNDING, certify, relative_gap
from cacheplan.solvers.feasible import checked_knapsack
from cacheplan.solvers.lagrangian import Relaxed, relax
from cacheplan.solvers.lattice import common_unit
from cacheplan.solvers.quiet import quiet
from cacheplan.types.problem import Integers, Knapsack, Solution

_TRUSTED = 1e-6  # HiGHS's tolerances, in the scaled objective
_TIME_LIMIT = 1  # status of scipy.optimize.milp


@dataclass(frozen=True)
class Milp:
    """Optimal within the relative `gap`, or the best found after `seconds` and its true gap.

    The Lagrangian goes first: where its own bound proves `gap`, that is the answer.  Otherwise
    HiGHS searches the options that may still beat the Lagrangian choice.
    """

    gap: float = 1e-4
    seconds: float = 10.0

    def __call__(self, problem: Knapsack) -> Solution:
        problem = checked_knapsack(problem)
        relaxed = relax(problem)
        if relative_gap(relaxed.value, relaxed.bound) <= max(self.gap, ROUNDING):
            by = "the Lagrangian bound (HiGHS was not needed)"
            return certify(problem, relaxed.choice, relaxed.bound, by=by, optimal=self.gap)
        found, bound, stopped = self._search(relaxed)
        choice = relaxed.best(found)  # HiGHS may pass the budget within its tolerances
        by = f"HiGHS, stopped after {self.seconds:g} s" if stopped else "HiGHS"
        return certify(problem, choice, bound, by=by, optimal=max(self.gap, _TRUSTED))

    def _search(self, relaxed: Relaxed) -> tuple[Integers, float, bool]:
        """The best choice HiGHS finds, its bound, and whether time was up.

        Costs and the bound are distances to the relaxation's bound in units of `value - bound`:
        with the multiplier `m` and the unspent budget `z`, `sum d x = bound + sum reduced x + m z`.
        So HiGHS's absolute tolerances fit any scale.  Rates are counted in their common unit,
        as integers let HiGHS cut far deeper, or else in the rate that `value - bound` buys.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import
        from scipy.sparse import csr_array, vstack

        rate, width = relaxed.problem.rate, relaxed.value - relaxed.bound
        site, option = np.nonzero(np.isfinite(relaxed.problem.distortion))
        bought = width / relaxed.multiplier
        added = (rate - rate.min(1, keepdims=True))[site, option] / bought
        spare = (relaxed.problem.budget - math.fsum(rate.min(1))) / bought
        costs = relaxed.reduced[site, option] / width - added  # m z is spare - sum added x
        unit = common_unit(added)
        counts, capacity = (np.rint(added / unit), round(spare / unit)) if unit else (added, spare)
        each = np.ones(len(rate))
        one_option = csr_array((np.ones(len(site)), (site, np.arange(len(site)))))
        with quiet():
            result = milp(
                costs,
                integrality=np.ones(len(site), dtype=np.int64),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(
                    vstack([one_option, csr_array(counts[None])]),
                    np.append(each, 0),
                    np.append(each, capacity),
                ),
                options={
                    "time_limit": self.seconds,
                    "mip_rel_gap": self.gap * relaxed.bound / width / max(spare, 1.0),
                },
            )
        choice = relaxed.choice
        if result.x is not None:
            taken = np.flatnonzero(result.x > 0.5)
            choice = choice.copy()
            choice[site[taken]] = option[taken]
        below = 0.0
        if result.mip_dual_bound is not None:
            below = min(max(result.mip_dual_bound + spare - _TRUSTED, 0.0), 1.0)
        return choice, relaxed.bound + below * width, result.status == _TIME_LIMIT
