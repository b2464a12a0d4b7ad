"""Forecasts as weights of computed features; one definition for planning and for running."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import factorial
from operator import mul

from cacheplan.errors import UnsupportedError

HORIZON = 2  # steps; WorldCache's own `n_max`


def weights(
    basis: str, order: int, keys: Sequence[int], step: int, abscissae: Sequence[float]
) -> tuple[float, ...]:
    """What each computed feature counts in the one of `step`; the weights sum to 1.

    `keys` are the steps computed before `step`, newest first, at least one.  The newest
    min(`order`, len(`keys`) - 1) + 1 get a weight, in this order.  `abscissae` has one number
    per step, such as its noise level.

    "hold": the newest feature.  "taylor": TaylorSeer's series over step indices (arXiv
    2503.06923).  "newton": the polynomial of degree `order` through the keys over `abscissae`,
    exact where the feature is one.  "hermite": WorldCache's damped line over step indices.

    UnsupportedError for any other basis.
    """
    used = list(keys[: order + 1])
    if basis == "hold":
        return (1.0,) + (0.0,) * (len(used) - 1)
    if basis == "taylor":
        return _taylor(used, step)
    if basis == "newton":
        return _newton([abscissae[key] for key in used], abscissae[step])
    if basis == "hermite":
        return _hermite(used, step)
    raise UnsupportedError(
        f'A forecast on the basis "{basis}" has no weights of its own; expected one of hold, '
        "taylor, newton, hermite."
    )


def _taylor(keys: list[int], step: int) -> tuple[float, ...]:
    """TaylorSeer's ladder, run on unit vectors, of which it is a linear function.

    At each computed step level j + 1 is the change of level j since the one before, divided by
    the steps between these two.  The levels are taken for derivatives, which they are only
    nearly: even on evenly spaced keys a parabola is missed.  This is what the method does.
    """
    n, last = len(keys), 0
    ladder: list[list[float]] = []
    for age in range(n - 1, -1, -1):  # oldest first
        fresh = [[float(index == age) for index in range(n)]]
        for level in ladder:
            gap = keys[age] - last
            fresh.append([(new - old) / gap for new, old in zip(fresh[-1], level, strict=True)])
        ladder, last = fresh, keys[age]
    ahead = step - last
    factors = [ahead**j / factorial(j) for j in range(n)]
    columns = zip(*ladder, strict=True)  # what one feature counts on every level
    return tuple(sum(map(mul, factors, column)) for column in columns)


def _newton(points: list[float], at: float) -> tuple[float, ...]:
    """Lagrange's form of Newton's polynomial; of keys at one place only the newest counts."""
    result = []
    for index, point in enumerate(points):
        weight = float(point not in points[:index])
        for other in dict.fromkeys(points):
            if other != point:
                weight *= (at - other) / (point - other)
        result.append(weight)
    return tuple(result)


def _hermite(keys: list[int], step: int) -> tuple[float, ...]:
    """Newest feature plus steps times velocity, which eases from the newest to the one before.

    The ease is 3 u^2 - 2 u^3 of the way u through a run of skipped steps, whose length is taken
    to be that of the run before, and at least `HORIZON`.
    """
    result = [1.0] + [0.0] * (len(keys) - 1)
    ahead = step - keys[0]
    gaps = [newer - older for newer, older in pairwise(keys[:3])]
    ease = 0.0
    if len(gaps) == 2:
        way = min(1.0, ahead / max(HORIZON, gaps[0] - 1))
        ease = way * way * (3 - 2 * way)
    for index, (gap, share) in enumerate(zip(gaps, (1 - ease, ease), strict=False)):
        result[index] += share * ahead / gap
        result[index + 1] -= share * ahead / gap
    return tuple(result)
