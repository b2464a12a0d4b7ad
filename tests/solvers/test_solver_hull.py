"""Hulls and dominance against their definitions; exchanges back into the budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.solvers.exchange import improve
from cacheplan.solvers.hull import lower_hull, undominated
from cacheplan.types.problem import Floats, Knapsack


def random_sites(seed: int, lattice: bool) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    if lattice:
        rate = rng.integers(0, 6, (3, 6)).astype(np.float64)
        distortion = rng.integers(0, 6, (3, 6)).astype(np.float64)
    else:
        rate, distortion = rng.random((3, 6)), rng.random((3, 6))
    missing = rng.random((3, 6)) < 0.2
    missing[:, 0] = False
    return np.where(missing, rate.max(), rate), np.where(missing, np.inf, distortion)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_the_hull_is_the_cheapest_at_every_price(seed: int, lattice: bool) -> None:
    rate, distortion = random_sites(seed, lattice)
    hull = lower_hull(rate, distortion)
    assert (np.diff(hull.slope) <= 0).all()
    for price in [0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 100.0]:
        choice = hull.start.copy()
        for site, option, slope in zip(hull.site, hull.option, hull.slope, strict=True):
            if slope > price:
                choice[site] = option
        priced = distortion + price * rate
        found = np.take_along_axis(priced, choice[:, None], 1)[:, 0]
        np.testing.assert_allclose(found, priced.min(1), rtol=1e-12)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_undominated_is_its_definition(seed: int, lattice: bool) -> None:
    rate, distortion = random_sites(seed, lattice)
    kept = undominated(rate, distortion)
    for site in range(len(rate)):
        options = list(zip(rate[site], distortion[site], range(rate.shape[1]), strict=True))
        for r, d, o in options:
            beaten = any(
                a <= r and b <= d and ((a, b) != (r, d) or i < o) for a, b, i in options if i != o
            )
            assert kept[site, o] == (np.isfinite(d) and not beaten)


def test_steps_of_a_non_convex_site_skip_the_dent() -> None:
    hull = lower_hull(np.arange(5.0)[None], np.array([[8, 7, 2, 1, 0.5]]))
    assert hull.option.tolist() == [2, 3, 4]
    assert hull.slope.tolist() == [3, 1, 0.5]
    assert hull.added.tolist() == [2, 1, 1]


def test_steps_on_a_line_stay_in_order() -> None:
    rng = np.random.default_rng(0)
    rate = np.sort(rng.integers(0, 40, (500, 6)) / 3, axis=1)
    distortion = (15 - rate) * rng.random((500, 1))  # one slope, up to rounding
    hull = lower_hull(rate, distortion)
    for site in range(500):
        steps = hull.site == site
        assert (np.diff(rate[site, hull.option[steps]]) > 0).all()
        assert hull.added[steps].sum() == pytest.approx(np.ptp(rate[site]))


def test_exchange_returns_below_the_budget() -> None:
    rate, distortion = np.tile([0.0, 1.0, 2.0], (3, 1)), np.tile([4.0, 1.0, 0.0], (3, 1))
    problem = Knapsack(rate, distortion, 4.0)
    choice = improve(problem, np.array([2, 2, 2]), distortion + rate)
    assert rate[np.arange(3), choice].sum() == 4
    assert distortion[np.arange(3), choice].sum() == 2


def test_exchange_swaps_two_sites() -> None:
    rate, distortion = np.array([[0.0, 3.0], [0.0, 2.0]]), np.array([[5.0, 0.0], [4.0, 0.0]])
    problem = Knapsack(rate, distortion, 3.0)
    assert improve(problem, np.array([0, 1]), distortion + rate).tolist() == [1, 0]
