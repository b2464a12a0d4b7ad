"""Schedules: usable numbers, what a given one costs, and the Solution it makes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cacheplan.errors import InfeasibleError, InputError, ProfileError
from cacheplan.solvers.certify import relative_gap
from cacheplan.solvers.feasible import SLACK
from cacheplan.types.problem import Floats, Integers, Schedule, Solution

Mask = NDArray[np.bool_]


def checked_schedule(problem: Schedule) -> Schedule:
    """The problem in the form that solvers compute with: rates as float64, step 0 forced.

    Raises InputError for shapes that do not fit together and ProfileError naming the site for
    NaN or negative numbers.
    """
    forced = np.array(problem.forced, dtype=np.bool_)
    if forced.ndim != 2 or not forced.size:
        raise InputError(
            f"The forced steps have shape {forced.shape}, expected [sites, steps] with at least "
            "one of each."
        )
    S, T = forced.shape
    expected: dict[str, tuple[int, ...]] = {
        "rate": (S,),
        "base": (S,),
        "hold": (S, T, T + 1),
        "forecast": (S, T, T, T + 1),
        "change": (S, T, T),
        "ratios": (S, T),
    }
    for name, shape in expected.items():
        found = getattr(problem, name)
        if found is not None and np.shape(found) != shape:
            raise InputError(
                f'The schedule\'s "{name}" has shape {np.shape(found)}, expected {shape} for {S} '
                f"sites and {T} steps."
            )
    if not problem.budget >= 0:
        raise InputError(f"The budget is {problem.budget:g}, expected a number of at least 0.")
    step = np.arange(T + 1)
    later = step > step[:T, None]  # [T, T + 1]
    for name in ("rate", "base"):
        numbers = getattr(problem, name)
        _refuse(~((numbers >= 0) & np.isfinite(numbers)), f"a {name} that is not a finite number")
    _refuse(~(problem.hold >= 0) & later, "hold distortions that are NaN or negative")
    if problem.forecast is not None:
        ordered = later[:, :T, None] & later
        _refuse(~(problem.forecast >= 0) & ordered, "forecast distortions that are NaN or negative")
    forced[:, 0] = True
    return replace(
        problem,
        rate=problem.rate.astype(np.float64),
        base=problem.base.astype(np.float64),
        hold=problem.hold.astype(np.float64),
        forced=forced,
    )


def distortions(problem: Schedule, computed: Mask, sites: Integers | None = None) -> Floats:
    """Distortion of each row of `computed` `[rows, T]`; `inf` where a forced step is left out.

    `sites` `[rows]` says whose schedule each row is; without it the rows are the sites in order.
    """
    rows, T = computed.shape
    sites = np.arange(rows) if sites is None else sites
    row, key = np.nonzero(computed)
    same = np.append(row[1:] == row[:-1], False)  # another key of the same row follows
    following = np.where(same, np.append(key[1:], 0), T)
    owner = sites[row]
    costs = problem.hold[owner, key, following].astype(np.float64)
    if problem.forecast is not None:
        second = np.flatnonzero(np.append(False, same[:-1]))  # keys with one before them
        before = key[second - 1]
        costs[second] = problem.forecast[owner[second], before, key[second], following[second]]
    sums = np.zeros(rows)
    np.add.at(sums, row, costs)
    sums[(problem.forced[sites] & ~computed).any(1) | ~computed[:, 0]] = np.inf
    return sums


def rates(problem: Schedule, computed: Mask) -> Floats:
    """What the sites' schedules `computed` `[S, T]` cost, `[S]`."""
    total: Floats = problem.base + problem.rate * computed.sum(1)
    return total


def affordable(problem: Schedule, rate: float) -> bool:
    """Whether a rate is within the budget, up to rounding."""
    return rate <= problem.budget * (1 + SLACK)


def too_small(problem: Schedule, smallest: float, what: str) -> InfeasibleError:
    """The error for a budget below the `smallest` feasible rate; `what` is what takes it."""
    return InfeasibleError(
        f"The budget of {problem.budget:.6g} is below what {what} takes: the smallest feasible "
        f"budget is {smallest:.13g}."
    )


def refuse_impossible(possible: Mask) -> None:
    """Raises InfeasibleError naming a site where no number of keys `[S, any]` is possible."""
    for site in np.flatnonzero(~possible.any(1)):
        raise InfeasibleError(
            f"Site {site} has no schedule within its length limits and forced steps: allow "
            "shorter or longer segments."
        )


def solution(
    problem: Schedule, computed: Mask, status: str, *, bound: float | None = None
) -> Solution:
    """The Solution of a schedule `computed` `[S, T]` within the budget."""
    rate, value = math.fsum(rates(problem, computed)), math.fsum(distortions(problem, computed))
    assert affordable(problem, rate), "a solver exceeded the budget"
    gap = None if bound is None else relative_gap(value, bound)
    return Solution(computed.astype(np.int64), rate, value, bound, gap, status)


def _refuse(bad: Mask, what: str) -> None:
    for site in np.flatnonzero(bad.reshape(len(bad), -1).any(1)):
        raise ProfileError(f"Site {site} has {what}: profile again.")
