"""Every choice tried: the reference for small problems."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Literal

import numpy as np

from cacheplan.errors import InfeasibleError, InputError
from cacheplan.solvers.certify import certify
from cacheplan.solvers.feasible import checked_curves, checked_knapsack
from cacheplan.solvers.schedule import checked_schedule, distortions, refuse_impossible
from cacheplan.types.problem import (
    Coverage,
    Integers,
    Knapsack,
    Problem,
    Schedule,
    Solution,
    Split,
    TwoClasses,
)

_STATUS = "Optimal: proven by trying every choice."


@dataclass(frozen=True)
class Brute:
    """Exact for every kind of problem; of equal choices the first in lexicographic order.

    `objective` says which retained share a Split maximises.  Raises InputError where more than
    `limit` choices would have to be tried.
    """

    limit: int = 1_000_000
    objective: Literal["sum", "min"] = "sum"

    def __call__(self, problem: Problem) -> Solution:
        if isinstance(problem, Knapsack):
            return self._knapsack(problem)
        if isinstance(problem, Split):
            return self._split(problem)
        if isinstance(problem, Schedule):
            return self._schedule(problem)
        if isinstance(problem, TwoClasses):
            return self._classes(problem)
        return self._coverage(problem)

    def _knapsack(self, problem: Knapsack) -> Solution:
        problem = checked_knapsack(problem)
        sites, options = problem.rate.shape
        self._refuse_large(options**sites)
        rates, values = np.zeros(1), np.zeros(1)
        for rate, distortion in zip(problem.rate, problem.distortion, strict=True):
            rates = (rates[:, None] + rate).ravel()
            values = (values[:, None] + distortion).ravel()
        best = int(np.where(rates <= problem.budget, values, np.inf).argmin())
        choice = np.array(np.unravel_index(best, (options,) * sites), dtype=np.int64)
        return certify(problem, choice, float(values[best]), by="trying every choice")

    def _split(self, problem: Split) -> Solution:
        curves = checked_curves(problem)
        ranges = [range(a, b + 1) for a, b in zip(problem.lower, problem.upper, strict=True)]
        self._refuse_large(math.prod(map(len, ranges)))
        grid = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, len(ranges))
        grid = grid[grid.sum(1) == problem.total]  # [choices, sites]
        shares = np.stack([curve[k] for curve, k in zip(curves, grid.T, strict=True)], 1)
        values = shares.sum(1) if self.objective == "sum" else shares.min(1)
        best = int(values.argmax())
        value = float(values[best])
        return Solution(grid[best], float(problem.total), value, value, 0.0, _STATUS)

    def _coverage(self, problem: Coverage) -> Solution:
        size = min(problem.size, problem.items)
        self._refuse_large(math.comb(problem.items, size))
        best = max(
            combinations(range(problem.items), size), key=lambda c: problem.value(frozenset(c))
        )
        value = problem.value(frozenset(best))
        chosen: Integers = np.array(best, dtype=np.int64)
        return Solution(chosen, float(size), value, value, 0.0, _STATUS)

    def _classes(self, problem: TwoClasses) -> Solution:
        sites = len(problem.cost)
        self._refuse_large(2**sites)
        choices = np.array(list(product((0, 1), repeat=sites)), dtype=np.int64)
        costs = problem.cost[:, choices.sum(1)].T  # [choices, sites]
        allowed = np.isfinite(costs).all(1)
        if not allowed.any():
            raise InfeasibleError("No number of whole sites is within the budget.")
        values = np.where(allowed, np.where(choices == 0, costs, 0.0).sum(1), np.inf)
        best = int(values.argmin())
        value = float(values[best])
        return Solution(choices[best], float(choices[best].sum()), value, value, 0.0, _STATUS)

    def _schedule(self, problem: Schedule) -> Solution:
        problem = checked_schedule(problem)
        S, T = problem.forced.shape
        self._refuse_large(2 ** (S * (T - 1)))
        masks = np.array(list(product([True], *([False, True],) * (T - 1))), dtype=np.bool_)
        distortion = np.stack(
            [distortions(problem, masks, np.full(len(masks), site)) for site in range(S)]
        )
        refuse_impossible(np.isfinite(distortion))
        rate = problem.base[:, None] + problem.rate[:, None] * masks.sum(1)
        best = self._knapsack(Knapsack(rate, distortion, problem.budget))
        return replace(best, choice=masks[best.choice].astype(np.int64))

    def _refuse_large(self, choices: int) -> None:
        if choices > self.limit:
            raise InputError(
                f"Trying every choice would mean {choices:.3g} of them, expected at most "
                f"{self.limit}: use another solver."
            )
