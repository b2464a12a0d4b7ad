"""Repairs: the union of keys, dropping back into a budget, local search."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.errors import InfeasibleError, InputError
from cacheplan.solvers.brute import Brute
from cacheplan.solvers.local_search import improve
from cacheplan.solvers.schedule import Mask, distortions, rates
from cacheplan.solvers.segments import hold_costs
from cacheplan.solvers.shortest_path import EqualKeys, ShortestPath
from cacheplan.solvers.union import bubbling_union, within_budget
from cacheplan.types import Schedule

DEPTHS = np.array([0, 0, 1, 1, 2, 2])  # attention and feed-forward of three blocks
FEED_FORWARD = np.array([False, True] * 3)


def masks(seed: int, S: int = 6, T: int = 8, share: float = 0.3) -> Mask:
    computed = np.random.default_rng(seed).random((S, T)) < share
    computed[:, 0] = True
    return computed


def walks(seed: int, S: int = 2, T: int = 7, budget: float = 6.0) -> Schedule:
    features = np.cumsum(np.random.default_rng(seed).normal(size=(S, T)), 1)
    hold = hold_costs(np.abs(features[:, :, None] - features[:, None]))
    return Schedule(np.ones(S), np.zeros(S), hold, None, np.zeros((S, T), dtype=bool), budget)


def predicted(problem: Schedule, computed: Mask) -> float:
    return float(distortions(problem, computed).sum())


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6), st.booleans())
def test_a_union_only_adds_what_donors_have(seed: int, count: int, deeper: bool) -> None:
    computed = masks(seed)
    errors = np.random.default_rng(seed).random(6)
    after = bubbling_union(
        computed, errors, depths=DEPTHS, count=count, receivers=FEED_FORWARD, deeper=deeper
    )
    assert (after | computed == after).all()
    assert (after[~FEED_FORWARD] == computed[~FEED_FORWARD]).all()
    donors = np.argsort(-errors)[:count]
    for site in np.flatnonzero(FEED_FORWARD):
        reached = DEPTHS[donors] < DEPTHS[site] if deeper else DEPTHS[donors] <= DEPTHS[site]
        expected = computed[site] | computed[donors[reached]].any(0)
        assert (after[site] == expected).all()
    if count == 0:
        assert (after == computed).all()
    more = bubbling_union(computed, errors, depths=DEPTHS, count=count + 1)
    assert (more | after == more).all()


def test_donors_may_be_filtered() -> None:
    computed = np.eye(6, 8, dtype=bool)
    errors = np.array([5.0, 1, 9, 2, 9, 0])
    after = bubbling_union(
        computed,
        errors,
        depths=DEPTHS,
        count=1,
        donors=FEED_FORWARD,
        receivers=FEED_FORWARD,
        deeper=True,
    )
    assert np.argwhere(after & ~computed).tolist() == [[5, 3]]
    with pytest.raises(InputError, match="errors have shape"):
        bubbling_union(computed, errors[:3], depths=DEPTHS, count=1)
    with pytest.raises(InputError, match="takes -1 donors"):
        bubbling_union(computed, errors, depths=DEPTHS, count=-1)


def test_dropping_goes_back_into_the_budget() -> None:
    problem = replace(walks(0, S=6, T=8, budget=20.0), rate=np.array([1.0, 2, 1, 2, 1, 2]))
    problem.forced[1, 3] = True
    computed = EqualKeys(4)(replace(problem, budget=1e9)).choice.astype(bool)
    united = bubbling_union(computed, np.arange(6.0), depths=DEPTHS, count=6)
    back = within_budget(problem, united)
    assert rates(problem, united).sum() > 20
    assert 18 < rates(problem, back).sum() <= 20
    assert (back & ~united).sum() == 0
    assert back[:, 0].all()
    assert back[1, 3]
    assert predicted(problem, back) < math.inf
    assert (within_budget(problem, back) == back).all()
    assert (within_budget(replace(problem, budget=1e9), united) == united).all()
    with pytest.raises(InfeasibleError, match="the smallest feasible budget is 11"):
        within_budget(replace(problem, budget=5.0), united)


def test_dropping_takes_the_smallest_loss() -> None:
    problem = walks(1, S=1, budget=6.0)
    one_less = within_budget(problem, np.ones((1, 7), dtype=bool))
    assert predicted(problem, one_less) == Brute()(problem).value
    expensive = replace(problem, rate=np.zeros(1), budget=0.0)
    assert within_budget(expensive, np.ones((1, 7), dtype=bool)).all()
    never = replace(problem, hold=np.where(problem.hold == 0, 0.0, np.inf), budget=3.0)
    with pytest.raises(InfeasibleError, match="what cannot be dropped"):
        within_budget(never, np.ones((1, 7), dtype=bool))


def quadratic(seed: int, S: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(S * T, S * T)) / (S * T)
    return factor @ factor.T, rng.normal(size=S * T)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 6), st.sampled_from([None, 1, 2]))
def test_local_search_on_quadratics(seed: int, S: int, T: int, reach: int | None) -> None:
    matrix, vector = quadratic(seed, S, T)
    rng = np.random.default_rng(seed)
    start, forced = masks(seed, S, T), rng.random((S, T)) < 0.2
    rate = rng.integers(1, 4, S).astype(float)
    budget = float(((start | forced).sum(1) * rate).sum() + rng.integers(0, 3))
    seen: list[bytes] = []

    def objective(computed: Mask) -> float:
        x = computed.ravel().astype(float)
        seen.append(computed.tobytes())
        return float(x @ matrix @ x + vector @ x)

    found = improve(start, objective, forced=forced, rate=rate, budget=budget, reach=reach)
    assert found.finished
    assert found.value <= found.start == objective(start | forced | (np.arange(T) == 0))
    assert found.value == objective(found.computed)
    assert found.computed[forced].all()
    assert found.computed[:, 0].all()
    assert (found.computed.sum(1) * rate).sum() <= budget
    assert found.evaluations == len(seen) - 2
    assert len(set(seen)) == found.evaluations
    again = improve(start, objective, forced=forced, rate=rate, budget=budget, reach=reach)
    assert (again.computed == found.computed).all()


def test_it_finds_the_best_of_separable_objectives() -> None:
    # exchanges of one pair suffice: the best is the largest weights
    for seed in range(20):
        weights = np.random.default_rng(seed).random((3, 6))
        start = masks(seed, 3, 6)
        found = improve(start, lambda c, w=weights: -float(w[c].sum()))  # type: ignore[misc]
        free = weights.copy()
        free[:, 0] = -np.inf
        best = weights[:, 0].sum() + np.sort(free.ravel())[::-1][: start.sum() - 3].sum()
        assert found.value == pytest.approx(-best)


@pytest.mark.parametrize("guided", [False, True])
def test_it_comes_close_to_brute_force(guided: bool) -> None:
    reached = 0
    for seed in range(20):
        problem = walks(seed)
        start = np.zeros((2, 7), dtype=bool)
        start[:, :3] = True
        found = improve(
            start,
            lambda c, p=problem: predicted(p, c),  # type: ignore[misc]
            guide=problem if guided else None,
        )
        best = Brute()(problem).value
        assert best * (1 - 1e-12) <= found.value <= found.start
        reached += found.value == pytest.approx(best)
        planned = ShortestPath("dynamic")(problem)
        kept = improve(planned.choice.astype(bool), lambda c, p=problem: predicted(p, c))  # type: ignore[misc]
        assert kept.value == pytest.approx(best)
    assert reached >= 15


def test_a_guide_saves_evaluations() -> None:
    problem = walks(3, S=4, T=20, budget=24.0)
    start = np.zeros((4, 20), dtype=bool)
    start[:, :6] = True
    found = [
        improve(start, lambda c: predicted(problem, c), guide=guide, evaluations=limit)
        for guide, limit in ((problem, 15), (None, 150))
    ]
    assert [search.evaluations for search in found] == [15, 150]
    assert found[0].value < found[1].value


def test_progress_is_told() -> None:
    problem = walks(5)
    heard: list[tuple[int, float]] = []
    found = improve(
        masks(5, 2, 7),
        lambda c: predicted(problem, c),
        progress=lambda count, value: heard.append((count, value)),
    )
    assert [count for count, _ in heard] == list(range(1, found.evaluations + 1))
    values = [value for _, value in heard]
    assert values == sorted(values, reverse=True)
    assert (values[0], values[-1]) == (found.start, found.value)


def test_limits_of_the_search() -> None:
    start = masks(0, 2, 6)
    weights = np.random.default_rng(0).random((2, 6))

    def objective(computed: Mask) -> float:
        return -float(weights[computed].sum())

    one = improve(start, objective, evaluations=1)
    assert (one.evaluations, one.finished) == (1, False)
    assert (one.computed == start).all()
    some = improve(start, objective, evaluations=5)
    assert (some.evaluations, some.finished) == (5, False)
    lazy = improve(start, objective, worth=10.0)
    assert lazy.finished
    assert (lazy.computed == start).all()
    assert (improve(start, objective, reach=0).computed.sum(0) == start.sum(0)).all()
    with pytest.raises(InputError, match="within the budget of 2"):
        improve(np.ones((2, 6), dtype=bool), objective, budget=2.0)
    with pytest.raises(InputError, match="0 evaluations"):
        improve(start, objective, evaluations=0)
    with pytest.raises(InputError, match="is NaN"):
        improve(start, lambda c: math.nan)


def test_it_leaves_schedules_that_are_not_allowed() -> None:
    problem = walks(4, S=1, T=8, budget=3.0)
    steps = np.arange(9) - np.arange(8)[:, None]
    problem = replace(problem, hold=np.where(steps > 4, np.inf, problem.hold))
    start = np.arange(8)[None] < 3
    assert predicted(problem, start) == math.inf
    for guide in (None, problem):
        found = improve(start, lambda c: predicted(problem, c), guide=guide)
        assert found.value < math.inf
