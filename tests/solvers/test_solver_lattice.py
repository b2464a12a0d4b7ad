"""The common unit against integer gcd, and narrowing that loses nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.solvers.brute import Brute
from cacheplan.solvers.feasible import checked_knapsack
from cacheplan.solvers.hull import undominated
from cacheplan.solvers.lattice import common_unit, narrow
from cacheplan.types.problem import Knapsack

SCALES = [1.0, 0.01, 1 / 640, 1 / 3, 4096.0, 1e-9]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=30), st.sampled_from(SCALES))
def test_the_unit_is_the_greatest_divisor(numbers: list[int], scale: float) -> None:
    unit = common_unit(np.array(numbers) * scale)
    assert unit == pytest.approx(math.gcd(*numbers) * scale, rel=1e-9)


def test_the_unit_of_differences_between_shares() -> None:
    keeps = np.array([0.02, 0.03, 0.1, 0.13, 0.65, 1.0]) / 640
    assert common_unit(keeps - keeps[0]) == pytest.approx(0.01 / 640)


def test_scattered_numbers_have_none() -> None:
    for seed in range(50):
        numbers = np.random.default_rng(seed).random(2 + seed)
        assert common_unit(numbers) == 0
    assert common_unit(np.array([1.0, 1 + 1e-4])) == pytest.approx(1e-4)
    assert common_unit(np.array([1.0, 1 + 1e-8])) == 0
    assert common_unit(np.array([1.0, 2, 3 + 5e-11])) == 0
    assert common_unit(np.zeros(3)) == 0


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SCALES))
def test_narrowing_keeps_the_best_choice(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    rate = rng.integers(0, 6, (4, 4)).astype(np.float64) * 3 * scale
    budget = rate.min(1).sum() + rng.uniform(0, 20) * scale
    problem = checked_knapsack(Knapsack(rate, rng.random((4, 4)), budget))
    smaller = narrow(problem, undominated(problem.rate, problem.distortion))
    assert smaller.budget <= problem.budget
    units = smaller.budget / (3 * scale)
    assert units == pytest.approx(round(units), abs=1e-8)
    assert Brute()(smaller).choice.tolist() == Brute()(problem).choice.tolist()


def test_options_that_leave_too_little_go() -> None:
    rate, distortion = np.array([[1.0, 5], [1, 2]]), np.array([[3.0, 0], [2, 1]])
    smaller = narrow(Knapsack(rate, distortion, 4.0), np.ones((2, 2), bool))
    assert smaller.distortion[0].tolist() == [3, np.inf]
    assert smaller.budget == pytest.approx(3)
