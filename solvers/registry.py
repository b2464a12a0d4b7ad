"""The solvers by name."""

from __future__ import annotations

from collections.abc import Callable

from cacheplan.errors import InputError
from cacheplan.solvers.brute import Brute
from cacheplan.solvers.dynamic import Dynamic
from cacheplan.solvers.lagrangian import Lagrangian
from cacheplan.solvers.milp import Milp
from cacheplan.solvers.prefix import Prefix
from cacheplan.solvers.proportional import Proportional
from cacheplan.solvers.uniform import Uniform
from cacheplan.types.problem import Knapsack, Solution, Split

KnapsackSolver = Callable[[Knapsack], Solution]

KNAPSACK: dict[str, Callable[[], KnapsackSolver]] = {
    "milp": Milp,
    "dynamic": Dynamic,
    "lagrangian": Lagrangian,
    "brute": Brute,
}
SplitSolver = Callable[[Split], Solution]
DIVISION: dict[str, SplitSolver] = {
    "uniform": Uniform(),
    "prefix": Prefix(),
    "proportional": Proportional(),
}


def knapsack_solver(name: str) -> KnapsackSolver:
    """The solver of that name with its default settings; raises InputError listing the names."""
    if name not in KNAPSACK:
        raise InputError(
            f'There is no knapsack solver "{name}": choose one of {", ".join(KNAPSACK)}.'
        )
    return KNAPSACK[name]()
