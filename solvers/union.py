"""Repair schedules that were planned site by site: the bubbling union of BAC."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from cacheplan.errors import InputError
from cacheplan.solvers.schedule import (
    Mask,
    affordable,
    checked_schedule,
    distortions,
    rates,
    too_small,
)
from cacheplan.types.problem import Floats, Integers, Schedule


def bubbling_union(
    computed: Mask,
    errors: ArrayLike,
    *,
    depths: ArrayLike,
    count: int,
    donors: ArrayLike | None = None,
    receivers: ArrayLike | None = None,
    deeper: bool = False,
) -> Mask:
    """Let the sites of largest error hand their keys on to sites at the same depth or deeper.

    BAC (arXiv 2506.13456): an upstream site that is refreshed changes what later sites would
    compute, so these are refreshed with it.  The `count` largest `errors` `[S]` among the
    `donors` give their keys; `receivers` (both `[S]` of booleans, all sites by default) take
    them where their block `depths` `[S]` is at least the donor's.  The published code takes
    feed-forward receivers; a port asks for strictly `deeper` ones.  Equal errors: first site
    first.  Keys are only ever added.
    """
    S = len(computed)
    depth, error = np.asarray(depths), np.asarray(errors, dtype=np.float64)
    gives = np.ones(S, dtype=np.bool_) if donors is None else np.asarray(donors, dtype=np.bool_)
    takes = np.ones(S, dtype=np.bool_) if receivers is None else np.asarray(receivers, np.bool_)
    for name, array in (("errors", error), ("depths", depth), ("donors", gives)):
        if array.shape != (S,):
            raise InputError(f"The {name} have shape {array.shape}, expected one for {S} sites.")
    if takes.shape != (S,) or count < 0 or np.isnan(error).any():
        raise InputError(
            f"The union takes {count} donors and receivers of shape {takes.shape}, expected at "
            f"least 0, one flag for each of {S} sites, and errors that are not NaN."
        )
    order = np.argsort(-error, kind="stable")
    result = computed.copy()
    for donor in order[gives[order]][:count]:
        reached = depth > depth[donor] if deeper else depth >= depth[donor]
        result[takes & reached] |= computed[donor]
    return result


def within_budget(problem: Schedule, computed: Mask) -> Mask:
    """Drop keys until the budget holds: always the one that adds least distortion per rate.

    Forced steps stay.  Raises InfeasibleError naming the smallest rate this reaches.
    """
    problem = checked_schedule(problem)
    computed = computed.copy()
    added = np.stack([_added(problem, computed, site) for site in range(len(computed))])
    while not affordable(problem, spent := math.fsum(rates(problem, computed))):
        site, step = np.unravel_index(int(added.argmin()), added.shape)
        if added[site, step] == np.inf:
            raise too_small(problem, spent, "what cannot be dropped")
        computed[site, step] = False
        added[site] = _added(problem, computed, int(site))
    return computed


def _added(problem: Schedule, computed: Mask, site: int) -> Floats:
    """Distortion per rate that dropping each key of a site adds, `[T]`; `inf` where it may not."""
    added = np.full(computed.shape[1], np.inf)
    keys = np.flatnonzero(computed[site] & ~problem.forced[site])
    if keys.size and problem.rate[site] > 0:
        without = drop_each(computed[site], keys)
        now = float(distortions(problem, computed[site][None], np.array([site]))[0])
        after = distortions(problem, without, np.full(len(keys), site))
        added[keys] = (after - (now if now < np.inf else 0.0)) / problem.rate[site]
    return added


def drop_each(computed: Mask, keys: Integers) -> Mask:
    """Copies of one site's schedule `[T]`, each without one of the `keys`: `[len(keys), T]`."""
    copies = np.tile(computed, (len(keys), 1))
    copies[np.arange(len(keys)), keys] = False
    return copies
