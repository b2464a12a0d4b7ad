"""Rounding, uniform, proportional and marginal division against brute force and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.errors import InfeasibleError, InputError, ProfileError
from cacheplan.solvers.brute import Brute
from cacheplan.solvers.marginal import Marginal
from cacheplan.solvers.prefix import Prefix, PrefixWalk
from cacheplan.solvers.proportional import Proportional
from cacheplan.solvers.rounding import largest_remainder
from cacheplan.solvers.uniform import Uniform
from cacheplan.types.problem import Floats, Integers, Split

BY_CURVES = [Marginal(), Prefix(), PrefixWalk(), Brute()]


def limits(*values: int) -> Integers:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize(
    ("shares", "total", "units"),
    [
        ([0.5, 0.3, 0.2], 7, [4, 2, 1]),
        ([1, 1, 1], 10, [4, 3, 3]),
        ([0, 0], 3, [2, 1]),
        ([0.1] * 10, 10, [1] * 10),
        ([2, 1], 0, [0, 0]),
    ],
)
def test_largest_remainder(shares: list[float], total: int, units: list[int]) -> None:
    assert largest_remainder(shares, total).tolist() == units


def test_largest_remainder_keeps_limits() -> None:
    found = largest_remainder([1, 0, 0], 1000, limits(0, 100, 0), limits(300, 1000, 450))
    assert found.sum() == 1000
    assert found[0] == 300
    assert largest_remainder([0, 1, 1], 3, limits(1, 0, 0), limits(3, 3, 3)).tolist() == [1, 1, 1]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=6),
    st.integers(0, 200),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=6, max_size=6),
)
def test_largest_remainder_sums_exactly(
    shares: list[float], total: int, boxes: list[tuple[int, int]]
) -> None:
    free = largest_remainder(shares, total)
    assert free.sum() == total
    if sum(shares) > 0:
        wanted = np.array(shares) / sum(shares) * total
        assert (np.abs(free - wanted) < 1 + 1e-6).all()
    low = limits(*(min(box) for box in boxes[: len(shares)]))
    high = limits(*(max(box) for box in boxes[: len(shares)]))
    total = min(max(total, int(low.sum())), int(high.sum()))
    boxed = largest_remainder(shares, total, low, high)
    assert boxed.sum() == total
    assert ((low <= boxed) & (boxed <= high)).all()


@pytest.mark.parametrize("shares", [[np.nan], [-1.0], [np.inf]])
def test_unusable_shares(shares: list[float]) -> None:
    with pytest.raises(InputError, match="shares to round"):
        largest_remainder(shares, 3)


def test_golden_proportional() -> None:
    weights = np.array([4.0, 2, 1, 1])
    problem = Split(64, limits(0, 0, 0, 0), limits(64, 64, 64, 64), weights=weights)
    assert Proportional()(problem).choice.tolist() == [32, 16, 8, 8]


def test_proportional_pours_over() -> None:
    weights = np.array([4.0, 2, 1, 1])
    problem = Split(64, limits(0, 0, 10, 0), limits(20, 64, 64, 64), weights=weights)
    solution = Proportional()(problem)
    assert solution.choice.tolist() == [20, 22, 11, 11]
    assert solution.rate == 64


def test_weightless_sites_are_filled_last() -> None:
    problem = Split(10, limits(0, 0, 0), limits(4, 9, 9), weights=np.array([1.0, 0, 0]))
    assert Proportional()(problem).choice.tolist() == [4, 3, 3]
    problem = Split(5, limits(0, 0), limits(9, 9), weights=np.zeros(2))
    assert Proportional()(problem).choice.tolist() == [3, 2]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.integers(0, 10**6))
def test_proportional_has_one_water_level(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 20, 5)
    high = low + rng.integers(0, 60, 5)
    weights = rng.random(5) + 0.01
    total = int(rng.integers(low.sum(), high.sum() + 1))
    units = Proportional()(Split(total, low, high, weights=weights)).choice
    assert units.sum() == total
    assert ((low <= units) & (units <= high)).all()
    # no site above its lower limit stands a unit higher than one below its upper limit
    lowest = np.where(units > low, (units - 1) / weights, -np.inf)
    highest = np.where(units < high, (units + 1) / weights, np.inf)
    assert lowest.max() <= highest.min() * (1 + 1e-9)


def test_uniform() -> None:
    problem = Split(10, limits(0, 0, 0), limits(9, 2, 9))
    solution = Uniform()(problem)
    assert solution.choice.tolist() == [4, 2, 4]
    assert (solution.value, solution.bound, solution.gap) == (0, None, None)
    curves = tuple(np.linspace(0, 1, 11) for _ in range(3))
    solution = Uniform()(Split(10, limits(0, 0, 0), limits(10, 10, 10), curves=curves))
    assert solution.choice.tolist() == [4, 3, 3]
    assert solution.value == pytest.approx(1.0)


@st.composite
def divisions(draw: st.DrawFn) -> Split:
    """Up to four sites of up to six units, with ties and empty tails or without."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    sites, lattice = draw(st.integers(1, 4)), draw(st.booleans())
    curves, low, high = [], [], []
    for _ in range(sites):
        size = int(rng.integers(1, 7))
        scores = rng.integers(0, 4, size).astype(np.float64) if lattice else rng.random(size)
        scores = -np.sort(-scores)
        scores[0] += 0.5
        curves.append(np.concatenate([[0.0], np.cumsum(scores) / scores.sum()]))
        high.append(int(rng.integers(0, size + 1)))
        low.append(int(rng.integers(0, high[-1] + 1)) if draw(st.booleans()) else 0)
    total = draw(st.integers(sum(low), sum(high)))
    return Split(total, limits(*low), limits(*high), curves=tuple(curves))


@settings(derandomize=True, max_examples=250, deadline=None)
@given(divisions())
def test_marginal_retains_most(problem: Split) -> None:
    best, found = Brute()(problem), Marginal()(problem)
    assert found.value == pytest.approx(best.value, rel=1e-12)
    assert found.choice.sum() == problem.total
    assert ((problem.lower <= found.choice) & (found.choice <= problem.upper)).all()


@settings(derandomize=True, max_examples=250, deadline=None)
@given(divisions())
def test_prefix_is_fairest_and_equals_the_walk(problem: Split) -> None:
    best, found, walked = Brute(objective="min")(problem), Prefix()(problem), PrefixWalk()(problem)
    assert found.value == best.value
    assert found.choice.tolist() == walked.choice.tolist()
    assert found.choice.sum() == problem.total
    assert ((problem.lower <= found.choice) & (found.choice <= problem.upper)).all()


@pytest.mark.parametrize("solver", [Uniform(), Proportional(), *BY_CURVES])
class TestRefusals:
    def test_infeasible(self, solver: Any) -> None:
        curves = (np.linspace(0, 1, 10),) * 2
        boxes: Any = {"weights": np.ones(2), "curves": curves}
        with pytest.raises(InfeasibleError, match="the smallest feasible total is 5 units"):
            solver(Split(4, limits(2, 3), limits(9, 9), **boxes))
        with pytest.raises(InfeasibleError, match="the largest feasible total is 13 units"):
            solver(Split(14, limits(0, 0), limits(4, 9), **boxes))

    def test_crossed_limits(self, solver: Any) -> None:
        with pytest.raises(InputError, match="Site 1 has the limits 5 and 4"):
            solver(Split(4, limits(0, 5), limits(9, 4), weights=np.ones(2)))

    def test_shapes(self, solver: Any) -> None:
        with pytest.raises(InputError, match="expected the same"):
            solver(Split(4, limits(0, 5), limits(9), weights=np.ones(2)))


@pytest.mark.parametrize("solver", BY_CURVES)
class TestCurves:
    def test_missing(self, solver: Any) -> None:
        with pytest.raises(InputError, match="needs curves"):
            solver(Split(4, limits(0), limits(9)))
        with pytest.raises(InputError, match="1 curves, expected one for each of 2"):
            solver(Split(4, limits(0, 0), limits(1, 9), curves=(np.ones(2),)))

    @pytest.mark.parametrize("curve", [[0, np.nan, 1], [0, 0.6, 0.5], [-0.1, 0.5, 1]])
    def test_unusable(self, solver: Any, curve: list[float]) -> None:
        curves = np.array([0, 0.5, 1]), np.array(curve)
        with pytest.raises(ProfileError, match="curve of site 1"):
            solver(Split(2, limits(0, 0), limits(2, 2), curves=curves))

    def test_short(self, solver: Any) -> None:
        with pytest.raises(InputError, match="3 points, expected 10"):
            solver(Split(2, limits(0), limits(9), curves=(np.array([0, 0.5, 1]),)))


def test_marginal_refuses_a_bent_curve() -> None:
    with pytest.raises(ProfileError, match="site 0 is not concave"):
        Marginal()(Split(1, limits(0), limits(2), curves=(np.array([0, 0.2, 1]),)))


@pytest.mark.parametrize("weights", [None, np.ones(3)])
def test_proportional_needs_weights(weights: Floats | None) -> None:
    with pytest.raises(InputError, match="one weight for each site"):
        Proportional()(Split(2, limits(0, 0), limits(2, 2), weights=weights))


@pytest.mark.parametrize("wrong", [np.nan, -1.0, np.inf])
def test_proportional_names_the_unusable_weight(wrong: float) -> None:
    with pytest.raises(ProfileError, match="weight of site 1"):
        Proportional()(Split(2, limits(0, 0), limits(2, 2), weights=np.array([1.0, wrong])))
