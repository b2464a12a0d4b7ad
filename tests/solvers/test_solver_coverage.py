"""Lazy greedy choice against plain greedy choice and every set tried."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.errors import InputError, ProfileError
from cacheplan.solvers.brute import Brute
from cacheplan.solvers.coverage import LazyGreedy
from cacheplan.types.problem import Coverage

Value = Callable[[frozenset[int]], float]


def facility(seed: int, items: int) -> Value:
    """`sum_i max_(j in S) s_ij` with integer similarities, so that sums are exact."""
    similarity = np.random.default_rng(seed).integers(0, 20, (12, items))

    def value(chosen: frozenset[int]) -> float:
        return float(similarity[:, sorted(chosen)].max(1, initial=0).sum())

    return value


def plain_greedy(problem: Coverage) -> list[int]:
    chosen: frozenset[int] = frozenset()
    while len(chosen) < problem.size:
        left = [e for e in range(problem.items) if e not in chosen]
        best = max(left, key=lambda e: (problem.value(chosen | {e}), -e), default=None)
        if best is None or problem.value(chosen | {best}) <= problem.value(chosen):
            break
        chosen |= {best}
    return sorted(chosen)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(0, 8))
def test_lazy_is_plain_and_near_the_best(seed: int, items: int, size: int) -> None:
    problem = Coverage(items, size, facility(seed, items))
    solution, best = LazyGreedy()(problem), Brute()(problem)
    assert solution.choice.tolist() == plain_greedy(problem)
    assert solution.value == problem.value(frozenset(solution.choice.tolist()))
    assert solution.rate == len(solution.choice) <= size
    assert solution.value >= (1 - 1 / math.e) * best.value
    assert solution.bound is not None
    assert solution.value <= best.value <= solution.bound * (1 + 1e-12)
    assert solution.gap is not None
    if solution.status.startswith("Optimal"):
        assert solution.value == pytest.approx(best.value, rel=1e-4)


def test_lazy_asks_less() -> None:
    items, size = 200, 10
    calls = 0
    inner = facility(0, items)

    def value(chosen: frozenset[int]) -> float:
        nonlocal calls
        calls += 1
        return inner(chosen)

    LazyGreedy()(Coverage(items, size, value))
    assert calls < items * size / 2


def test_the_bound_counts_every_element_greedy_missed() -> None:
    # greed takes the two decoys, 14 of 16; each true set then still adds 1
    sets = [{*range(8)}, {*range(8, 16)}, {0, 1, 2, 3, 8, 9, 10, 11, 12}, {4, 5, 6, 13, 14}]
    problem = Coverage(4, 2, lambda s: float(len(set().union(*(sets[e] for e in s)))))
    solution = LazyGreedy()(problem)
    assert solution.choice.tolist() == [2, 3]
    assert (solution.value, solution.bound) == (14, 16)
    assert Brute()(problem).value == 16


def test_an_offset_does_not_weaken_the_bound() -> None:
    inner = facility(1, 6)
    plain = LazyGreedy()(Coverage(6, 2, inner))
    lifted = LazyGreedy()(Coverage(6, 2, lambda s: inner(s) + 1000))
    assert plain.bound is not None
    assert lifted.bound == pytest.approx(plain.bound + 1000)


def test_refusals() -> None:
    with pytest.raises(InputError, match="at least 0"):
        LazyGreedy()(Coverage(3, -1, lambda s: 0.0))
    with pytest.raises(ProfileError, match=r"value of the set \[0\] is nan"):
        LazyGreedy()(Coverage(3, 1, lambda s: math.nan if s else 0.0))
