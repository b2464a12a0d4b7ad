"""Golden vectors of the common threshold on retained mass."""

from __future__ import annotations

import numpy as np
import pytest

from cacheplan.solvers.prefix import Prefix, PrefixWalk, shortest
from cacheplan.types.problem import Floats, Split

SCORES = np.array([[8, 4, 2, 1, 1], [4, 4, 4, 2, 2], [12, 1, 1, 1, 1]], dtype=np.float64)


def curve(scores: Floats) -> Floats:
    """Share of mass in the best 0, 1, ... tokens."""
    return np.concatenate([[0.0], np.cumsum(-np.sort(-scores)) / scores.sum()])


def split(scores: Floats, total: int) -> Split:
    sites, tokens = scores.shape
    curves = tuple(curve(row) for row in scores)
    return Split(total, np.zeros(sites, np.int64), np.full(sites, tokens), curves=curves)


@pytest.mark.parametrize(
    ("theta", "units"),
    [
        (0.25, [1, 1, 1]),
        (0.5, [1, 2, 1]),
        (0.75, [2, 3, 1]),
        (0.8125, [3, 4, 2]),
        (0.875, [3, 4, 3]),
        (0.9375, [4, 5, 4]),
        (1.0, [5, 5, 5]),
    ],
)
@pytest.mark.parametrize("solver", [Prefix(), PrefixWalk()])
def test_golden_thresholds(solver: Prefix | PrefixWalk, theta: float, units: list[int]) -> None:
    problem = split(SCORES, sum(units))
    assert shortest(problem.curves or (), problem.lower, theta).tolist() == units
    solution = solver(problem)
    assert solution.choice.tolist() == units
    assert solution.value >= theta
    assert solution.value == solution.bound


@pytest.mark.parametrize("solver", [Prefix(), PrefixWalk()])
def test_golden_residual(solver: Prefix | PrefixWalk) -> None:
    # no threshold keeps 7 or 8: from (2, 3, 1), each next unit brings 2, 2 and 1 sixteenths
    assert solver(split(SCORES, 7)).choice.tolist() == [3, 3, 1]
    assert solver(split(SCORES, 8)).choice.tolist() == [3, 4, 1]


def pareto(shape: float, tokens: int = 600) -> Floats:
    """Scores at the mid quantiles of a Pareto (Lomax) distribution."""
    rank = (np.arange(tokens) + 0.5) / tokens
    return np.asarray(rank ** (-1 / shape) - 1)


@pytest.mark.parametrize("solver", [Prefix(), PrefixWalk()])
def test_golden_pareto(solver: Prefix | PrefixWalk) -> None:
    # shapes for which an equal retained mass of 0.962 forgets 480, 341, 205 and 174 of 600
    scores = np.stack([pareto(shape) for shape in (0.775, 1.009, 2.105, 4.77)])
    solution = solver(split(scores, 1200))
    assert (600 - solution.choice).tolist() == [480, 341, 205, 174]
    masses = [curve(row)[k] for row, k in zip(scores, solution.choice, strict=True)]
    assert np.round(masses, 3).tolist() == [0.962] * 4
    assert max(masses) - min(masses) < 1 / 600


def test_a_full_budget_keeps_everything() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((4, 33))  # the curves may end beside 1 by rounding
    for solver in (Prefix(), PrefixWalk()):
        assert solver(split(scores, 4 * 33)).choice.tolist() == [33] * 4


def test_large_divisions_agree() -> None:
    rng = np.random.default_rng(1)
    scores = rng.pareto(rng.uniform(0.6, 4, (32, 1)), (32, 2000))
    scores[5, 100:] = 0  # an empty tail: many equal breakpoints
    for total in (32, 1000, 20_000, 63_000):
        problem = split(scores, total)
        found, walked = Prefix()(problem), PrefixWalk()(problem)
        assert found.choice.tolist() == walked.choice.tolist()
        assert found.choice.sum() == total
