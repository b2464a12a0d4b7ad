"""Checks shared by the solvers: usable numbers, and a budget that some choice meets."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from cacheplan.errors import InfeasibleError, InputError, ProfileError
from cacheplan.types.problem import Floats, Knapsack, Split

SLACK = 1e-12  # relative: a sum of rates may pass the budget by rounding, by nothing else


def checked_knapsack(problem: Knapsack) -> Knapsack:
    """The problem in the form that solvers compute with; shapes stay `[sites, options]`.

    Unavailable options get distortion `inf` and their site's smallest rate, so that rates are
    finite and nothing chooses them.  The budget is at most what the largest rates take together,
    and grows by `SLACK`.  Raises ProfileError naming the site for NaN, negative numbers or no
    option at all, and InfeasibleError naming the smallest feasible budget.
    """
    rate, distortion = problem.rate.astype(np.float64), problem.distortion.astype(np.float64)
    if rate.ndim != 2 or rate.shape != distortion.shape or not rate.size:
        raise InputError(
            f"Rates have shape {rate.shape} and distortions {distortion.shape}, expected the same "
            "[sites, options] for both, with at least one of each."
        )
    if not problem.budget >= 0:
        raise InputError(f"The budget is {problem.budget:g}, expected a number of at least 0.")
    for name, numbers in (("rates", rate), ("distortions", distortion)):
        _refuse_sites((~(numbers >= 0)).any(1), f"{name} that are NaN or negative")
    available = np.isfinite(rate) & np.isfinite(distortion)
    _refuse_sites(~available.any(1), "no option of finite rate and distortion")
    least = rate.min(1, where=available, initial=np.inf)
    rate = np.where(available, rate, least[:, None])
    smallest = math.fsum(least)
    budget = min(problem.budget, math.fsum(rate.max(1))) * (1 + SLACK)
    if smallest > budget:
        raise InfeasibleError(
            f"The budget of {problem.budget:.6g} is below what the cheapest option of every site "
            f"takes together: the smallest feasible budget is {smallest:.13g}."
        )
    return Knapsack(rate, np.where(available, distortion, np.inf), budget)


def check_split(problem: Split) -> None:
    """Raises InputError for unusable limits and InfeasibleError if no division fits them."""
    lower, upper = problem.lower, problem.upper
    if lower.ndim != 1 or lower.shape != upper.shape or not lower.size:
        raise InputError(
            f"The limits have shapes {lower.shape} and {upper.shape}, expected the same [sites] "
            "for both, with at least one site."
        )
    for site in np.flatnonzero((lower < 0) | (lower > upper)):
        raise InputError(
            f"Site {site} has the limits {lower[site]} and {upper[site]}, expected "
            "0 <= lower <= upper."
        )
    least, most = int(lower.sum()), int(upper.sum())
    if problem.total < least:
        raise InfeasibleError(
            f"The total of {problem.total} units is below the lower limits of the sites together: "
            f"the smallest feasible total is {least} units."
        )
    if problem.total > most:
        raise InfeasibleError(
            f"The total of {problem.total} units is above what the sites can hold together: "
            f"the largest feasible total is {most} units."
        )


def checked_curves(problem: Split) -> tuple[Floats, ...]:
    """The curves of a valid problem: `upper + 1` finite, non-decreasing numbers for each site."""
    check_split(problem)
    if problem.curves is None:
        raise InputError("This solver divides by retained mass: the problem needs curves.")
    if len(problem.curves) != len(problem.upper):
        raise InputError(
            f"There are {len(problem.curves)} curves, expected one for each of "
            f"{len(problem.upper)} sites."
        )
    for site, (curve, upper) in enumerate(zip(problem.curves, problem.upper, strict=True)):
        if len(curve) <= upper:
            raise InputError(
                f"The curve of site {site} has {len(curve)} points, expected {upper + 1} for its "
                f"upper limit of {upper} units."
            )
        if not (np.isfinite(curve).all() and (np.diff(curve, prepend=0.0) >= 0).all()):
            raise ProfileError(
                f"The curve of site {site} holds NaN or negative numbers or falls, expected shares "
                "that never fall: profile again."
            )
    return tuple(c[: u + 1] for c, u in zip(problem.curves, problem.upper, strict=True))


def _refuse_sites(bad: ArrayLike, what: str) -> None:
    for site in np.flatnonzero(bad):
        raise ProfileError(f"Site {site} has {what}: profile again.")
