"""PAB's schedule: even stretches in fixed proportions, as short as the budget allows."""

from __future__ import annotations

import numpy as np
import pytest

from cacheplan.errors import InfeasibleError
from cacheplan.solvers.broadcast import Broadcast
from cacheplan.solvers.segments import hold_costs
from cacheplan.types import Schedule

T = 20


def schedule(budget: float, rate: tuple[float, ...] = (2.0, 1.0)) -> Schedule:
    """Steps 0 to 2 and the last three are forced."""
    forced = np.ones((len(rate), T), bool)
    forced[:, 3:17] = False
    return Schedule(
        rate=np.array(rate),
        base=np.array([5.0, *(0.0,) * (len(rate) - 1)]),
        hold=np.stack([hold_costs(np.zeros((T, T)))] * len(rate)),
        forecast=None,
        forced=forced,
        budget=budget,
    )


def test_the_published_ranges() -> None:
    """Spatial attention every second step, cross-attention every sixth, all outside the middle."""
    rule = Broadcast((2, 6)).rule(schedule(0), 1.0)
    expected = [[*range(4), *range(5, 17, 2), *range(17, 20)], [*range(4), 9, 15, *range(17, 20)]]
    assert [np.flatnonzero(row).tolist() for row in rule] == expected


@pytest.mark.parametrize("budget", [30.0, 38.0, 44.0, 55.0, 65.0])
def test_stretches_are_the_shortest_that_fit(budget: float) -> None:
    problem, solver = schedule(budget), Broadcast((2, 6))
    found = solver(problem)
    assert found.rate <= budget * (1 + 1e-9)
    factors = np.linspace(0, T, 4001)  # every one that makes a difference
    costs = [5 + (solver.rule(problem, f).sum(1) * [2, 1]).sum() for f in factors]
    fits = [i for i, cost in enumerate(costs) if cost <= budget]
    assert found.rate == pytest.approx(costs[fits[0]])
    assert found.status.startswith("Broadcast to stretches of ")


def test_budgets_that_ranges_cannot_meet() -> None:
    least = 5 + 2 * 7 + 7  # six forced steps and one of the middle
    assert Broadcast((2, 6))(schedule(least)).rate == pytest.approx(least)
    with pytest.raises(InfeasibleError, match=f"smallest feasible budget is {least}"):
        Broadcast((2, 6))(schedule(least - 0.5))
    assert Broadcast((2, 6))(schedule(1000.0)).choice.all()
