"""Divide equally."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cacheplan.solvers.certify import retained
from cacheplan.solvers.feasible import check_split
from cacheplan.solvers.proportional import divide
from cacheplan.types.problem import Solution, Split


@dataclass(frozen=True)
class Uniform:
    """The same number of units for every site, as far as limits allow: the baseline."""

    def __call__(self, problem: Split) -> Solution:
        check_split(problem)
        units = divide(problem, np.ones(len(problem.lower)))
        value = float(retained(problem, units).sum())
        status = "Divided equally, within the limits of each site."
        return Solution(units, float(problem.total), value, None, None, status)
