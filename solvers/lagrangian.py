"""The knapsack through its Lagrangian: a proven bound, and a choice close to it, in no time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cacheplan.solvers.certify import certify, picked
from cacheplan.solvers.exchange import improve
from cacheplan.solvers.feasible import SLACK, checked_knapsack
from cacheplan.solvers.hull import lower_hull, undominated
from cacheplan.solvers.lattice import narrow
from cacheplan.types.problem import Floats, Integers, Knapsack, Solution


@dataclass(frozen=True)
class Lagrangian:
    """The relaxed problem's optimum rounded to a feasible choice, then improved by exchanges.

    With one multiplier `m >= 0` for the budget the sites separate, and every `m` bounds the
    optimum from below: `L(m) = sum_l min_o (d[l, o] + m * r[l, o]) - m * budget` (Everett 1963;
    Sinha and Zoltners 1979 for the multiple-choice knapsack).  The best `m` is a slope of the
    sites' lower convex hulls, where `L` equals the linear relaxation.
    """

    def __call__(self, problem: Knapsack) -> Solution:
        problem = checked_knapsack(problem)
        relaxed = relax(problem)
        return certify(problem, relaxed.choice, relaxed.bound, by="the Lagrangian bound")


@dataclass(frozen=True, eq=False)
class Relaxed:
    """What the relaxation knows: `bound <= optimum <= value`, which `choice` reaches.

    `problem` has the same optimum as the original, with fewer options and no more budget.
    `reduced[l, o] = d[l, o] + m * r[l, o] - min_o' (d[l, o'] + m * r[l, o'])`, `[sites, options]`,
    is what option `o` adds to the bound at least.
    """

    problem: Knapsack
    multiplier: float
    bound: float
    reduced: Floats
    choice: Integers
    value: float

    @property
    def core(self) -> NDArray[np.bool_]:
        """The options of `choice` and those that a better one may use, `[sites, options]`."""
        core = self.reduced <= (self.value - self.bound) * (1 + 1e-9)
        core[np.arange(len(core)), self.choice] = True
        return core

    def best(self, *others: Integers) -> Integers:
        """The best of `choice` and the others improved; one above the budget must come back."""
        best, value = self.choice, self.value
        for other in others:
            improved = improve(self.problem, other, self.reduced)
            reached = picked(self.problem.distortion, improved)
            if reached < value and picked(self.problem.rate, improved) <= self.problem.budget:
                best, value = improved, reached
        return best


def relax(problem: Knapsack) -> Relaxed:
    """Bound and round a checked problem; narrow it to the core as long as that saves budget."""
    relaxed = _relax(narrow(problem, undominated(problem.rate, problem.distortion)))
    while True:
        smaller = narrow(relaxed.problem, relaxed.core)
        if smaller.budget >= relaxed.problem.budget * (1 - 10 * SLACK):
            return replace(relaxed, problem=smaller)
        again = _relax(smaller)
        if again.value > relaxed.value:
            bound = min(again.bound, relaxed.value)
            again = replace(again, choice=relaxed.choice, value=relaxed.value, bound=bound)
        relaxed = again


def _relax(problem: Knapsack) -> Relaxed:
    """Greedy along the hulls: steps in falling slope while they fit.

    The slope of the first step that does not fit is the multiplier.
    """
    hull = lower_hull(problem.rate, problem.distortion)
    choice = hull.start.copy()
    slack = problem.budget - picked(problem.rate, choice)
    stuck: set[int] = set()
    multiplier = 0.0
    columns = hull.site, hull.option, hull.added, hull.slope
    for site, option, added, slope in zip(*(c.tolist() for c in columns), strict=True):
        if site in stuck:
            continue
        if added <= slack:
            choice[site], slack = option, slack - added
        else:
            multiplier = multiplier or slope
            stuck.add(site)
    priced = problem.distortion + multiplier * problem.rate
    cheapest = priced.argmin(1)
    # summed as distortion minus priced slack: the large terms m * r cancel first
    spare = problem.budget - picked(problem.rate, cheapest)
    bound = picked(problem.distortion, cheapest) - multiplier * spare
    reduced = priced - priced.min(1, keepdims=True)
    choice = improve(problem, choice, reduced)
    value = picked(problem.distortion, choice)
    return Relaxed(problem, multiplier, min(max(bound, 0.0), value), reduced, choice, value)
