"""Round shares to integers that keep their sum."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from cacheplan.errors import InputError
from cacheplan.solvers.feasible import check_split
from cacheplan.types.problem import Integers, Split

_DECIMALS = 9  # of a remainder; what differs later is a tie


def largest_remainder(
    shares: ArrayLike,
    total: int,
    lower: Integers | None = None,
    upper: Integers | None = None,
) -> Integers:
    """Integers near `shares` (scaled to sum to `total`) that sum exactly to `total`, `[sites]`.

    Hamilton's method: round down, then give one unit each to the largest remainders, ties to the
    lower index.  Limits are kept; what they withhold goes to (or comes from) the other sites in
    the same order.  Raises InputError for unusable shares, InfeasibleError for the limits.
    """
    wanted = np.asarray(shares, dtype=np.float64)
    if wanted.ndim != 1 or not (np.isfinite(wanted).all() and (wanted >= 0).all()):
        raise InputError("The shares to round must be a list of finite numbers of at least 0.")
    low = np.zeros(len(wanted), dtype=np.int64) if lower is None else lower
    high = np.full(len(wanted), total) if upper is None else upper
    check_split(Split(total, low, high))
    wanted = wanted / wanted.max() if wanted.any() else np.ones(len(wanted))
    wanted *= total / wanted.sum()
    units: Integers = np.clip(np.floor(wanted), low, high).astype(np.int64)
    while missing := total - int(units.sum()):
        sign = 1 if missing > 0 else -1
        remainder = np.round(sign * (wanted - units), _DECIMALS)
        order = np.argsort(-remainder, kind="stable")
        room = (high - units) if sign > 0 else (units - low)
        movable = order[room[order] > 0]
        step = max(1, abs(missing) // len(movable))
        first = movable[: abs(missing) // step]
        units[first] += sign * np.minimum(step, room[first])
    return units
