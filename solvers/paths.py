"""Dynamic programs over keys: for every number of keys the best schedule of each site.

Shapes: hold `[S, T, T + 1]`, forecast `[S, T, T, T + 1]`.  The steps are walked once, with all
sites and numbers of keys at a time: when step `j` is reached, all schedules that end in the key
`j` are known, and each is extended to every next key `n` (`n = T`: the end).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacheplan.solvers.schedule import Mask
from cacheplan.types.problem import Floats, Integers, Schedule

Numbers = NDArray[np.floating[Any]]
_STATES = 2**23  # of one chunk of sites, 8 bytes each


@dataclass(frozen=True, eq=False)
class Curves:
    """Per site and number of keys `K = 0 .. T` the least distortion and a schedule that has it.

    `inf` where no schedule has that many keys (0 always); its row of `computed` means nothing.
    """

    distortion: Floats  # [S, T + 1]
    computed: Mask  # [S, T + 1, T]


def curves(problem: Schedule, *, exact: bool = True) -> Curves:
    """The curves of a checked problem, a few sites at a time so that memory stays bounded.

    With `exact=False` and forecasts, the recurrence of DPCache (arXiv 2602.22654) keeps
    for each last key the one best key before it.  That is a heuristic: the key that is best for
    reaching `j` need not be best for what is forecast from `j` on.
    """
    S, T = problem.forced.shape
    pairs = problem.forecast is not None and exact
    chunk = max(1, _STATES // (T**3 if pairs else T**2))
    parts = []
    for start in range(0, S, chunk):
        sites = slice(start, start + chunk)
        jump = problem.hold[sites] + barriers(problem.forced[sites])
        forecast = None if problem.forecast is None else problem.forecast[sites]
        if pairs and forecast is not None:
            parts.append(_pairs(jump, forecast, barriers(problem.forced[sites])))
        else:
            parts.append(_chain(jump, forecast, barriers(problem.forced[sites])))
    return Curves(
        np.concatenate([part.distortion for part in parts]),
        np.concatenate([part.computed for part in parts]),
    )


def barriers(forced: Mask) -> Floats:
    """0 where key `n` may follow key `j`, `inf` where a forced step is between, `[S, T, T + 1]`."""
    S, T = forced.shape
    steps = np.append(np.where(forced, np.arange(T), T), np.full((S, 1), T), axis=1)
    nearest = np.minimum.accumulate(steps[:, ::-1], axis=1)[:, ::-1]  # first forced step from j on
    key, following = np.arange(T)[:, None], np.arange(T + 1)
    allowed = (following > key) & (following <= nearest[:, 1:, None])
    return np.where(allowed, 0.0, np.inf)


def _chain(hold: Floats, forecast: Numbers | None, barrier: Floats) -> Curves:
    """State: the last key.  Exact without forecasts, DPCache's recurrence with them."""
    S, T, _ = hold.shape
    value = np.full((S, T + 2, T + 1), np.inf)  # [S, keys so far, last or next key]
    before = np.zeros((S, T + 2, T + 1), dtype=np.int64)
    value[:, 1, 0] = 0.0
    site = np.arange(S)[:, None]
    for j in range(T):
        known = slice(1, j + 2)
        jump: Floats = hold[:, None, j, j + 1 :]
        if forecast is not None and j > 0:
            jump = barrier[:, None, j, j + 1 :] + forecast[site, before[:, known, j], j, j + 1 :]
        found = value[:, known, j, None] + jump  # [S, keys, T - j]
        kept = value[:, 2 : j + 3, j + 1 :]
        better = found < kept
        np.copyto(kept, found, where=better)
        np.copyto(before[:, 2 : j + 3, j + 1 :], j, where=better)
    distortion = value[:, 1:, T].copy()  # the end counts as one key more
    computed = np.zeros((S, T + 1, T), dtype=np.bool_)
    row, keys = np.nonzero(np.isfinite(distortion))
    left, at = keys + 1, np.full(len(row), T)
    while len(row):
        at, left = before[row, left, at], left - 1
        computed[row, keys, at] = True
        row, keys, left, at = (x[left > 1] for x in (row, keys, left, at))
    return Curves(distortion, computed)


def _pairs(hold: Floats, forecast: Numbers, barrier: Floats) -> Curves:
    """State: the last two keys.  Exact."""
    S, T, _ = hold.shape
    value = np.full((S, T, T + 1, T), np.inf)  # [S, last key, keys so far, key before it]
    total = np.full((S, T + 1, T), np.inf)  # [S, keys, last key]
    value[:, 1:, min(2, T), 0] = hold[:, 0, 1:T]
    total[:, 1, 0] = hold[:, 0, T]
    for j in range(1, T):
        jump = forecast[:, :j, j, j + 1 :] + barrier[:, None, j, j + 1 :]  # [S, i, T - j]
        found = np.full((S, j, T - j), np.inf)  # 2 .. j + 1 keys so far
        for i in range(j):
            states = value[:, j, 2 : i + 3, i, None]  # at most i + 2 keys
            few = found[:, : i + 1]
            np.minimum(few, states + jump[:, i, None], out=few)
        if j + 1 < T:
            value[:, j + 1 :, 3 : j + 3, j] = found[:, :, :-1].swapaxes(1, 2)
        total[:, 2 : j + 2, j] = found[:, :, -1]
    distortion = total.min(2)
    computed = np.zeros((S, T + 1, T), dtype=np.bool_)
    computed[:, :, 0] = True
    row, keys = np.nonzero(np.isfinite(distortion))
    last, following = total[row, keys].argmin(1), np.full(len(row), T)
    left = keys
    while len(row):
        computed[row, keys, last] = True
        more = left > 2  # with two keys left, the first is step 0
        row, keys, left, last, following = (x[more] for x in (row, keys, left, last, following))
        before = _best_before(value, forecast, row, left, last, following)
        last, following, left = before, last, left - 1
    return Curves(distortion, computed)


def _best_before(
    value: Floats,
    forecast: Numbers,
    row: Integers,
    left: Integers,
    last: Integers,
    following: Integers,
) -> Integers:
    """The key before `last` in the best schedule of `left` keys: sought again, not stored."""
    states = value[row, last, left]  # [rows, i]
    jump = np.where(np.isfinite(states), forecast[row, :, last, following], 0.0)
    before: Integers = (states + jump).argmin(1)
    return before
