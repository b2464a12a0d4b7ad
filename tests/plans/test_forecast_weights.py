from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.errors import UnsupportedError
from cacheplan.plans.forecast import weights

STEPS = [float(step) for step in range(60)]
BASES = ("hold", "taylor", "newton", "hermite")
gaps = st.lists(st.integers(1, 5), min_size=1, max_size=6)
orders = st.integers(0, 4)


def predict(basis: str, order: int, keys: list[int], step: int, values: list[float]) -> float:
    found = weights(basis, order, keys, step, STEPS)
    return sum(w * values[key] for w, key in zip(found, keys, strict=False))


def test_taylor_is_the_published_ladder_and_newton_the_exact_polynomial() -> None:
    squares = [step**2 for step in STEPS]
    for step, ladder in ((8, 58.7), (9, 69.8), (10, 82.3)):
        assert predict("taylor", 2, [7, 2, 0], step, squares) == pytest.approx(ladder, abs=1e-9)
        assert predict("newton", 2, [7, 2, 0], step, squares) == pytest.approx(step**2, abs=1e-9)


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_taylor_misses_parabolas_by_a_known_amount(ahead: int) -> None:
    squares, gap = [step**2 for step in STEPS], 4
    for order, missed in ((1, -(gap * ahead + ahead**2)), (2, -gap * ahead)):
        found = predict("taylor", order, [12, 8, 4], 12 + ahead, squares)
        assert found - squares[12 + ahead] == pytest.approx(missed, abs=1e-9)


def test_hermite_eases_from_the_newest_velocity_to_the_one_before() -> None:
    values = [0.0] * 60
    values[3], values[6] = 3.0, 12.0  # velocities 1, then 3; two skipped steps follow
    assert predict("hermite", 2, [6, 3, 0], 7, values) == pytest.approx(12 + 2)  # half way
    assert predict("hermite", 2, [6, 3, 0], 8, values) == pytest.approx(12 + 2 * 1)
    assert predict("hermite", 2, [6, 3, 0], 9, values) == pytest.approx(12 + 3 * 1)
    assert predict("hermite", 1, [6, 3, 0], 7, values) == pytest.approx(12 + 3)


def test_a_longer_run_of_skips_eases_longer() -> None:
    assert weights("hermite", 2, [10, 5, 0], 12, STEPS) == pytest.approx((1.2, 0.0, -0.2))


@pytest.mark.parametrize("basis", BASES)
def test_one_computed_step_is_held(basis: str) -> None:
    assert weights(basis, 3, [0], 4, STEPS) == (1.0,)
    assert weights(basis, 0, [4, 2], 6, STEPS) == (1.0,)


def test_keys_at_one_place_count_once() -> None:
    assert weights("newton", 2, [3, 2, 1], 4, [5.0, 4.0, 3.0, 3.0, 2.0]) == (2.0, 0.0, -1.0)


def test_fitted_weights_are_not_made_here() -> None:
    with pytest.raises(UnsupportedError, match='basis "fitted" has no weights of its own'):
        weights("fitted", 1, [1, 0], 2, STEPS)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.sampled_from(BASES), orders, gaps, st.integers(1, 5))
def test_weights_sum_to_one(basis: str, order: int, distances: list[int], ahead: int) -> None:
    keys = list(accumulate(distances, initial=0))[::-1]
    found = weights(basis, order, keys, keys[0] + ahead, STEPS)
    assert len(found) == min(order, len(keys) - 1) + 1
    assert sum(found) == pytest.approx(1, abs=1e-9 * max(map(abs, found)))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.sampled_from(["taylor", "newton", "hermite"]), st.integers(1, 4), gaps, st.integers(1, 5))
def test_lines_are_continued(basis: str, order: int, distances: list[int], ahead: int) -> None:
    keys = list(accumulate(distances, initial=0))[::-1]
    line = [3 - 2 * step for step in STEPS]
    found = predict(basis, order, keys, keys[0] + ahead, line)
    assert found == pytest.approx(line[keys[0] + ahead], abs=1e-6)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.lists(st.floats(0.5, 2), min_size=6, max_size=6),
    st.lists(st.floats(-3, 3), min_size=1, max_size=5),
)
def test_newton_is_exact_for_polynomials(drops: list[float], factors: list[float]) -> None:
    sigmas = [10 - fallen for fallen in accumulate(drops)]
    keys, order = [4, 3, 2, 1, 0], len(factors) - 1

    def polynomial(x: float) -> float:
        return sum(factor * x**power for power, factor in enumerate(factors))

    found = weights("newton", order, keys, 5, sigmas)
    values = [polynomial(sigmas[key]) for key in keys[: order + 1]]
    terms = [w * value for w, value in zip(found, values, strict=True)]
    assert sum(terms) == pytest.approx(polynomial(sigmas[5]), abs=1e-9 * (1 + sum(map(abs, terms))))
