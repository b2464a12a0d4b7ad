"""Problems and solutions: the plain values that solvers turn into each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
class Coverage:
    """Choose at most `size` of `items` elements: maximise a monotone submodular `value(set)`."""

    items: int
    size: int
    value: Callable[[frozenset[int]], float]


Problem = Knapsack | Split | Coverage


@dataclass(frozen=True, eq=False)
class Solution:
    """`choice` is the option per site, the units per site, or the sorted chosen elements.

    `value` is the objective reached: distortion (Knapsack, minimised), retained share (Split:
    the smallest over sites for thresholds, else the sum) or set value (Coverage, maximised).
    `rate` is what it uses of the budget.  `bound` is a proven limit on the best possible value
    and `gap = |value - bound| / max(|bound|, tiny)`; both None where nothing is proven.
    """

    choice: Integers
    rate: float
    value: float
    bound: float | None
    gap: float | None
    status: str
