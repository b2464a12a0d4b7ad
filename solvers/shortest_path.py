"""The best steps to compute, of each site and of all sites under one budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cacheplan.errors import InfeasibleError
from cacheplan.solvers.certify import certify
from cacheplan.solvers.feasible import SLACK, checked_knapsack
from cacheplan.solvers.lagrangian import relax
from cacheplan.solvers.paths import Curves, curves
from cacheplan.solvers.registry import knapsack_solver
from cacheplan.solvers.schedule import (
    affordable,
    checked_schedule,
    refuse_impossible,
    solution,
    too_small,
)
from cacheplan.types.problem import Floats, Knapsack, Schedule, Solution

_LEAST = "the fewest computations of every site together"


def curve(problem: Schedule, *, exact: bool = True) -> Curves:
    """The least distortion of each site for every number of keys, and the keys: the frontier.

    `exact=False` takes DPCache's recurrence for forecasts (see `paths.curves`).
    """
    return curves(checked_schedule(problem), exact=exact)


@dataclass(frozen=True)
class ShortestPath:
    """Each site's curve by dynamic programming, then a knapsack over the numbers of keys.

    Distortions add up over sites, so nothing is lost by the two stages: with `exact` curves the
    bound of the `coupling` (a knapsack solver's name) bounds the schedule.  Exact means ordered
    partitions as in CacheQuant (Liu et al. 2025, arXiv 2503.01323) where values are held, and
    the last two keys as state where they are forecast.  `exact=False` is DPCache's recurrence,
    which proves nothing.
    """

    coupling: str = "milp"
    exact: bool = True

    def __call__(self, problem: Schedule) -> Solution:
        couple = knapsack_solver(self.coupling)
        problem = checked_schedule(problem)
        found = curves(problem, exact=self.exact)
        knapsack = _knapsack(problem, found)
        sites = np.arange(len(problem.rate))
        if len(sites) == 1:
            within = np.where(knapsack.rate[0] <= problem.budget * (1 + SLACK), 0.0, np.inf)
            choice = (found.distortion + within).argmin(1)
            best = float(found.distortion[0, choice[0]])
            coupled = certify(knapsack, choice, best, by="dynamic programming over schedules")
        else:
            coupled = couple(knapsack)
        computed = found.computed[sites, coupled.choice]
        if not self.exact and problem.forecast is not None:
            return solution(problem, computed, "Feasible: the best found by DPCache's recurrence.")
        return Solution(
            computed.astype(np.int64),
            coupled.rate,
            coupled.value,
            coupled.bound,
            coupled.gap,
            coupled.status + _price(knapsack),
        )


@dataclass(frozen=True)
class EqualKeys:
    """The same number of computations at every site, each site's best ones.

    `keys=None` takes the largest number that the budget buys.  CacheQuant, BAC's first stage
    (arXiv 2506.13456) and DPCache (with `exact=False`) plan so.
    """

    keys: int | None = None
    exact: bool = True

    def __call__(self, problem: Schedule) -> Solution:
        problem = checked_schedule(problem)
        S, T = problem.forced.shape
        found = curves(problem, exact=self.exact)
        possible = found.distortion.max(0) < np.inf  # [T + 1]
        takes = [math.fsum(problem.base + problem.rate * keys) for keys in range(T + 1)]
        numbers = np.flatnonzero(possible)
        if not numbers.size:
            raise InfeasibleError(
                f"No number of computations is possible at all {S} sites within their length "
                "limits and forced steps: allow shorter or longer segments."
            )
        if self.keys is None:
            within = [keys for keys in numbers if affordable(problem, takes[keys])]
            if not within:
                raise too_small(problem, takes[numbers[0]], _LEAST)
            keys = int(within[-1])
        else:
            keys = self.keys
            if not (0 <= keys <= T and possible[keys]):
                raise InfeasibleError(
                    f"{keys} computations are not possible at every site within length limits and "
                    f"forced steps: the smallest possible number is {numbers[0]}, the largest "
                    f"{numbers[-1]}."
                )
            if not affordable(problem, takes[keys]):
                raise too_small(problem, takes[keys], f"computing every site {keys} times")
        by = "dynamic programming" if self.exact else "DPCache's recurrence"
        status = f"The best {keys} computations of every site, by {by}."
        return solution(problem, found.computed[:, keys], status)


def _knapsack(problem: Schedule, found: Curves) -> Knapsack:
    """Options are the numbers of keys `0 .. T`; raises InfeasibleError if none is affordable."""
    available = np.isfinite(found.distortion)
    refuse_impossible(available)
    keys = np.arange(available.shape[1])
    rate: Floats = problem.base[:, None] + problem.rate[:, None] * keys
    smallest = math.fsum(rate.min(1, where=available, initial=np.inf))
    if not affordable(problem, smallest):
        raise too_small(problem, smallest, _LEAST)
    return Knapsack(rate, found.distortion, problem.budget)


def _price(knapsack: Knapsack) -> str:
    """What the budget's multiplier says of a little more budget, in words; "" if it is slack."""
    multiplier = relax(checked_knapsack(knapsack)).multiplier
    spendable = math.fsum(knapsack.rate[:, -1])
    if not multiplier:
        return ""
    return f" One more percent of computation would save about {multiplier * spendable / 100:.3g}."
