"""Problems and solutions: the plain values that solvers turn into each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Knapsack:
    """Choose one option per site: minimise total distortion with total rate <= budget.

    `rate` and `distortion` have shape `[sites, options]`; a site with fewer options pads both
    with `inf`.  Rates are non-negative in any unit (bytes, FLOPs); this is the multiple-choice
    knapsack problem.
    """

    rate: Floats
    distortion: Floats
    budget: float


@dataclass(frozen=True, eq=False)
class Split:
    """Divide `total` identical units among sites: integers with `lower <= x <= upper`.

    `weights` `[sites]` is for proportional division.  `curves` holds one array per site: the
    share of mass retained by 0, 1, ..., len-1 units (non-decreasing, concave, ends at 1), for
    threshold and greedy division.
    """

    total: int
    lower: Integers
    upper: Integers
    weights: Floats | None = None
    curves: tuple[Floats, ...] | None = None


@dataclass(frozen=True, eq=False)
class TwoClasses:
    """Some sites stay whole, the others are cut alike to what is then left.

    `cost[s, n]` `[sites, sites + 1]` is the distortion of site s being cut while n sites stay
    whole; a column of `inf` is a number that is not allowed.
    """

    cost: Floats


@dataclass(frozen=True, eq=False)
class Coverage:
    """Choose at most `size` of `items` elements: maximise a monotone submodular `value(set)`."""

    items: int
    size: int
    value: Callable[[frozenset[int]], float]


@dataclass(frozen=True, eq=False)
class Schedule:
    """When to compute each site: minimise total distortion with total rate <= `budget`.

    Of `T` steps the computed ones are the site's keys; the steps between are served from them.
    `hold[s, j, k]` is the distortion of serving steps `j + 1 .. k - 1` when `j` is the only key
    so far and `k` is the next (`k = T`: the end); `forecast[s, i, j, k]` the same when `i` and `j`
    are the two newest keys.  Without `forecast`, `hold` counts throughout.  `inf` is what is not
    allowed, and entries out of order (`i < j < k`) are never read.  Step 0 is always a key.

    Greedy rules read what they threshold instead: `change[s, i, t]`, how far step `t` is from
    step `i`, relative; or `ratios[s, t]`, the norm at step `t` over that at step `t - 1`.
    """

    rate: Floats  # [S]: of one computation
    base: Floats  # [S]: what the site costs however it is scheduled, mostly 0
    hold: Floats  # [S, T, T + 1]
    forecast: NDArray[np.floating[Any]] | None  # [S, T, T, T + 1]
    forced: NDArray[np.bool_]  # [S, T]: steps that must be keys
    budget: float
    change: Floats | None = None  # [S, T, T]
    ratios: Floats | None = None  # [S, T]


Problem = Knapsack | Split | TwoClasses | Coverage | Schedule


@dataclass(frozen=True, eq=False)
class Solution:
    """`choice` is the option per site, the units per site, whether each site stays whole (0 or
    1), the sorted chosen elements, or which steps each site computes (Schedule: `[S, T]` of 0
    and 1).

    `value` is the objective reached: distortion (minimised; all problems but these:), retained
    share (Split: the smallest over sites for thresholds, else the sum) or set value (Coverage,
    maximised).
    `rate` is what it uses of the budget.  `bound` is a proven limit on the best possible value
    and `gap = |value - bound| / max(|bound|, tiny)`; both None where nothing is proven.
    """

    choice: Integers
    rate: float
    value: float
    bound: float | None
    gap: float | None
    status: str
