"""Curves of error over counted compute: their best points, their error at a budget, intervals.

A method's points that another of its points beats in both are left out, to its advantage.  Between
two points errors are interpolated log-linearly in compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from picture_runs import Measured

WHOLE = 0.999  # compute of runs that skip nothing: their errors are rounding
BEYOND = 0.02  # compute below a curve's lowest point that its last two points may be drawn on to


def mean_error(point: Measured) -> float:
    return float(np.mean(point.errors))


def front(points: Mapping[str, Measured]) -> list[str]:
    """The points that no other one beats, by rising compute, without runs that skip nothing."""
    found: list[str] = []
    order = sorted(points, key=lambda name: (points[name].compute, mean_error(points[name])))
    for name in order:
        error = mean_error(points[name])
        if points[name].compute < WHOLE and error < min(
            (mean_error(points[other]) for other in found), default=math.inf
        ):
            found.append(name)
    return found


@dataclass(frozen=True)
class At:
    """A place on a curve: one point, or two and the share of the second."""

    names: tuple[str, ...]
    share: float = 0.0

    def error(self, points: Mapping[str, Measured], rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """Mean errors `[R]` of resampled prompts `rows` `[R, n]`."""
        logs = [np.log(np.array(points[name].errors)[rows].mean(1)) for name in self.names]
        mixed: NDArray[np.float64] = np.exp(self._mixed(logs))
        return mixed

    def value(self, points: Mapping[str, Measured], of: Callable[[Measured], float]) -> float:
        return float(self._mixed([of(points[name]) for name in self.names]))

    def _mixed(self, values: Sequence[Any]) -> Any:
        return (1 - self.share) * values[0] + self.share * values[-1]


def place(points: Mapping[str, Measured], budget: float) -> At | None:
    """Where the curve has the compute `budget`; None if it does not come down to it.

    A curve that ends below the budget is represented by its last point.
    """
    names = front(points)
    computes = [points[name].compute for name in names]
    if not names or budget < computes[0] - BEYOND:
        return None
    upper = next((i for i, compute in enumerate(computes) if compute > budget), len(names))
    if upper == len(names):
        return At((names[-1],))
    if upper == 0 and len(names) == 1:
        return None
    upper = max(upper, 1)
    low, high = computes[upper - 1], computes[upper]
    return At((names[upper - 1], names[upper]), (budget - low) / (high - low))


def wanted(points: Mapping[str, Measured], tuning: Mapping[str, Measured], budget: float) -> str:
    """The next setting to measure so that `points` enclose the budget, or "".

    `tuning` are the same settings on other prompts, where all were measured; with few `points`,
    those around the budget there come first.
    """
    there = front(tuning)
    at = place(tuning, budget)
    for name in at.names if at else ():
        if name not in points:
            return name
    computes = [points[name].compute for name in there if name in points]
    if not computes:
        return ""
    measured = [index for index, name in enumerate(there) if name in points]
    if min(computes) > budget and measured[0] > 0:
        return there[measured[0] - 1]
    if max(computes) < budget and measured[-1] + 1 < len(there):
        return there[measured[-1] + 1]
    return ""
