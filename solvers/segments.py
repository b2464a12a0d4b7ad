"""Tables of what a stretch between two keys costs, summed from what its single steps cost."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from cacheplan.errors import InputError
from cacheplan.types.problem import Floats


def hold_costs(lags: ArrayLike, *, shortest: int = 1, longest: int | None = None) -> Floats:
    """From `lags[..., i, t]`, the cost of serving step `t` from key `i`, to `[..., T, T + 1]`.

    `hold[..., j, k]` is the sum over `t = j + 1 .. k - 1`: CacheQuant's segment cost (Liu et al.
    2025, arXiv 2503.01323) as a running sum instead of distances taken again for each segment.
    A key and the steps it serves are between `shortest` and `longest` steps; other lengths, the
    last one's too, cost `inf`.  So do steps whose lag was not measured, if they are `inf`.
    """
    return _running(np.asarray(lags, dtype=np.float64), shortest, longest)


def forecast_costs(steps: ArrayLike, *, shortest: int = 1, longest: int | None = None) -> Floats:
    """From `steps[..., i, j, t]`, the cost of step `t` forecast from keys `i < j`.

    The result `[..., T, T, T + 1]` is the sum over `t = j + 1 .. k - 1`, strictly between the
    keys: the path cost of DPCache (arXiv 2602.22654), whose paper also counts
    step `k`, where nothing is forecast.  Lengths are limited as in `hold_costs`.
    """
    costs = _running(np.asarray(steps, dtype=np.float64), shortest, longest)
    step = np.arange(costs.shape[-2])
    costs[..., step[:, None] >= step, :] = np.inf
    return costs


def relative(distance: Floats, size: Floats) -> Floats:
    """`change[..., i, t] = distance[..., i, t] / size[..., t]`: relative to the newer step.

    As SmoothCache and ERTACache divide; where the size is 0, only the distance 0 is small.
    """
    sizes = np.broadcast_to(size[..., None, :], distance.shape)
    infinite = np.where(distance > 0, np.inf, 0.0)
    return np.divide(distance, sizes, out=infinite, where=sizes > 0)


def _running(steps: Floats, shortest: int, longest: int | None) -> Floats:
    T = steps.shape[-1]
    if steps.ndim < 2 or steps.shape[-2] != T:
        raise InputError(f"Step costs have shape {steps.shape}, expected [..., steps, steps].")
    if not 1 <= shortest <= (T if longest is None else longest):
        raise InputError(
            f"Segments have {shortest} to {longest} steps, expected 1 <= shortest <= longest."
        )
    key, end = np.arange(T)[:, None], np.arange(T + 1)
    length = end - key  # [T, T + 1]
    allowed = (length >= shortest) & (length <= (T if longest is None else longest))
    costs = np.zeros((*steps.shape[:-1], T + 1))
    np.cumsum(np.where(end[:T] > key, steps, 0.0), axis=-1, out=costs[..., 1:])
    costs[..., ~allowed] = np.inf
    return costs
