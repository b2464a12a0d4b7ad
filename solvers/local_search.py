"""Improve a schedule by a measure of its own: move one key at a time and keep what helps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cacheplan.errors import InputError
from cacheplan.solvers.feasible import SLACK
from cacheplan.solvers.schedule import Mask, checked_schedule, distortions
from cacheplan.types.problem import Floats, Integers, Schedule

Objective = Callable[[Mask], float]  # of computed [S, T]; smaller is better
Progress = Callable[[int, float], None]  # evaluations so far, best value so far


@dataclass(frozen=True, eq=False)
class Searched:
    """The best schedule found, `[S, T]`, and its value; `finished` if no move improves it."""

    computed: Mask
    value: float
    start: float
    evaluations: int
    finished: bool


def improve(
    computed: Mask,
    objective: Objective,
    *,
    forced: Mask | None = None,
    rate: Floats | None = None,
    budget: float | None = None,
    reach: int | None = None,
    worth: float = 0.0,
    evaluations: int = 1000,
    guide: Schedule | None = None,
    progress: Progress | None = None,
) -> Searched:
    """Local search: the first move that lowers the objective is taken, until none does.

    A move takes a key to another step of its site, or drops one at a site and adds one at
    another; where the budget has room, a key is added.  `rate` `[S]` is what a key costs (1 by
    default), `budget` what all keys may cost (by default what the start's keys do); step 0 and
    `forced` steps `[S, T]` stay.  Moves go at most `reach` steps far.  Short moves are tried
    first, or, with a `guide`, those that lower its distortion most: an objective that runs the
    sampler is worth asking only about promising moves.  An improvement by less than the share
    `worth` does not count, and no schedule is evaluated twice.  At most `evaluations` are made,
    the start's included, and `progress` hears of each.  Deterministic if the objective is.
    """
    S, T = computed.shape
    kept = np.zeros((S, T), dtype=np.bool_) if forced is None else forced.copy()
    kept[:, 0] = True
    rate = np.ones(S) if rate is None else rate
    guide = None if guide is None else checked_schedule(guide)
    best = np.asarray(computed, dtype=np.bool_) | kept
    spent = math.fsum(best.sum(1) * rate)
    budget = spent if budget is None else budget
    if spent > budget * (1 + SLACK) or evaluations < 1:
        raise InputError(
            f"The local search starts at a rate of {spent:.6g} with {evaluations} evaluations, "
            f"expected a rate within the budget of {budget:.6g} and at least one evaluation."
        )
    value = start = float(objective(best))
    if math.isnan(value):
        raise InputError("The objective of the search's start is NaN, expected a number.")
    count, origin, finished = 1, 0, False
    tried = {best.tobytes()}
    if progress:
        progress(count, value)
    while not finished:
        spare = budget * (1 + SLACK) - math.fsum(best.sum(1) * rate)
        finished = True
        moves = _moves(best, kept, rate, spare=spare, reach=reach, guide=guide, origin=origin)
        for drop, add in zip(*(m.tolist() for m in moves), strict=True):
            changed = best.copy()
            if drop >= 0:
                changed.flat[drop] = False
            changed.flat[add] = True
            if changed.tobytes() in tried:
                continue
            if count == evaluations:
                return Searched(best, value, start, count, finished=False)
            tried.add(changed.tobytes())
            found = float(objective(changed.copy()))
            count += 1
            better = found < (value - worth * abs(value) if value < math.inf else value)
            if better:
                best, value, origin, finished = changed, found, add, False
            if progress:
                progress(count, value)
            if better:
                break
    return Searched(best, value, start, count, finished=True)


def _moves(
    computed: Mask,
    kept: Mask,
    rate: Floats,
    *,
    spare: float,
    reach: int | None,
    guide: Schedule | None,
    origin: int,
) -> tuple[Integers, Integers]:
    """Steps to drop (-1: none) and to add, numbered row by row, in the order to try them.

    Of equals those first that follow the last improvement (`origin`): it is left alone for a
    round, as in a walk along all sites.
    """
    T = computed.shape[1]
    keys, gaps = np.flatnonzero(computed & ~kept), np.flatnonzero(~computed)
    site, other = keys // T, gaps // T
    distance = np.abs((keys % T)[:, None] - gaps % T)  # [keys, gaps]
    allowed = rate[other] - rate[site][:, None] <= spare
    if reach is not None:
        allowed &= distance <= reach
    cost = np.where(site[:, None] == other, distance, distance + T).astype(np.float64)
    alone = np.zeros(len(gaps))  # cost of only adding
    if guide is not None:
        cost, alone = _predicted(guide, computed, keys, gaps)
    pairs, singles = np.nonzero(allowed & (cost < np.inf)), np.flatnonzero(rate[other] <= spare)
    drop = np.concatenate([np.full(len(singles), -1), keys[pairs[0]]])
    add = np.concatenate([gaps[singles], gaps[pairs[1]]])
    costs = np.concatenate([alone[singles], cost[pairs]])
    turn = (np.where(drop < 0, add, drop) - origin - 1) % computed.size
    order = np.lexsort((add, turn, costs))
    return drop[order], add[order]


def _predicted(
    guide: Schedule, computed: Mask, keys: Integers, gaps: Integers
) -> tuple[Floats, Floats]:
    """By how much moves change the guide's distortion: `[keys, gaps]`, and `[gaps]` if added."""
    T = computed.shape[1]
    now = distortions(guide, computed)
    now = np.where(np.isfinite(now), now, 0.0)

    def change(site: Integers, *toggled: Integers) -> Floats:
        rows = computed[site]
        for step in toggled:
            rows[np.arange(len(site)), step] ^= True
        changed: Floats = distortions(guide, rows, site) - now[site]
        return changed

    site, other = keys // T, gaps // T
    dropped, added = change(site, keys % T), change(other, gaps % T)
    both = dropped[:, None] + added
    key, gap = np.nonzero(site[:, None] == other)
    both[key, gap] = change(site[key], keys[key] % T, gaps[gap] % T)
    return both, added
