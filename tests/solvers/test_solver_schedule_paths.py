"""Schedules by dynamic programming against every schedule tried, golden vectors, refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.errors import InfeasibleError, InputError, ProfileError
from cacheplan.solvers import paths
from cacheplan.solvers.brute import Brute
from cacheplan.solvers.schedule import distortions, rates
from cacheplan.solvers.segments import forecast_costs, hold_costs, relative
from cacheplan.solvers.shortest_path import EqualKeys, ShortestPath, curve
from cacheplan.types import Schedule, Solution
from cacheplan.types.problem import Floats

INF = np.inf
SQUARES = np.arange(9.0) ** 2
TRIANGULAR = np.array([0.0, 1, 3, 6, 10, 15, 21, 28])
COUNTER_EXAMPLE = np.array([1.0, 4, 4, 1, 2, 4])


def lags(features: Floats) -> Floats:
    """`|F_i - F_t|` for one site, `[1, T, T]`."""
    return np.abs(features[:, None] - features)[None]


def lines(features: Floats) -> Floats:
    """Errors of the line through keys `i` and `j` at step `t`, `[1, T, T, T]`."""
    t = np.arange(len(features))
    i, j = t[:, None, None], t[None, :, None]
    slope = (features[j] - features[i]) / np.where(j > i, j - i, 1)
    errors: Floats = np.abs(features[j] + slope * (t - j) - features[t])
    return errors[None]


def one_site(
    features: Floats, keys: float, *, two: bool = False, forced: tuple[int, ...] = (), **limits: Any
) -> Schedule:
    """A schedule problem of one site at rate 1; `keys` is the budget."""
    T = len(features)
    return Schedule(
        rate=np.ones(1),
        base=np.zeros(1),
        hold=hold_costs(lags(features), **limits),
        forecast=forecast_costs(lines(features), **limits) if two else None,
        forced=np.isin(np.arange(T), forced)[None],
        budget=float(keys),
    )


def keys_of(solution: Solution, site: int = 0) -> list[int]:
    return np.flatnonzero(solution.choice[site]).tolist()


def feasible(problem: Schedule, solution: Solution) -> None:
    """The solution is what it says and keeps the budget, the forced steps and its own bound."""
    computed = solution.choice.astype(bool)
    assert solution.choice.shape == problem.forced.shape
    assert computed[:, 0].all()
    assert computed[problem.forced].all()
    assert solution.value == pytest.approx(distortions(problem, computed).sum(), rel=1e-9)
    assert solution.rate == pytest.approx(rates(problem, computed).sum(), rel=1e-12)
    assert solution.rate <= problem.budget * (1 + 1e-9)
    if solution.bound is not None:
        assert 0 <= solution.bound <= solution.value
    assert solution.status.endswith(".")


@st.composite
def problems(draw: st.DrawFn) -> Schedule:
    """Small problems of one or two sites: ties, forced steps, forbidden stretches, base rates."""
    S, T = draw(st.integers(1, 2)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    whole = draw(st.booleans())

    def numbers(*shape: int) -> Floats:
        found = rng.integers(0, 6, shape).astype(float) if whole else rng.gamma(0.5, size=shape)
        return np.where(rng.random(shape) < holes, INF, found)

    holes = draw(st.sampled_from([0.0, 0.2]))
    hold, forecast = numbers(S, T, T + 1), numbers(S, T, T, T + 1)
    forced = rng.random((S, T)) < draw(st.sampled_from([0.0, 0.3]))
    rate = rng.integers(0, 4, S).astype(float)
    base = rng.integers(0, 3, S) / 2
    share = draw(st.sampled_from([0.3, 0.5, 0.7, 1.0]))
    forecast_or_none = forecast if draw(st.booleans()) else None
    budget = float((base + share * rate * T).sum())
    return Schedule(rate, base, hold, forecast_or_none, forced, budget)


@settings(derandomize=True, max_examples=400, deadline=None)
@given(problems())
def test_it_is_as_good_as_every_schedule_tried(problem: Schedule) -> None:
    try:
        best = Brute()(problem)
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            ShortestPath()(problem)
        return
    feasible(problem, best)
    for coupling in ("milp", "dynamic", "lagrangian", "brute"):
        found = ShortestPath(coupling)(problem)
        feasible(problem, found)
        assert found.value >= best.value * (1 - 1e-9)
        assert found.bound is not None
        assert found.bound <= best.value * (1 + 1e-9)
        if coupling != "lagrangian" or len(problem.rate) == 1:
            assert found.value == pytest.approx(best.value, rel=2e-4)
    heuristic = ShortestPath("brute", exact=False)(problem) if _reachable(problem) else best
    feasible(problem, heuristic)
    assert heuristic.value >= best.value * (1 - 1e-9)
    if problem.forecast is None:
        assert heuristic.value == pytest.approx(best.value, rel=1e-9)


def _reachable(problem: Schedule) -> bool:
    """Whether DPCache's recurrence, with its one predecessor, finds an affordable schedule."""
    try:
        ShortestPath("brute", exact=False)(problem)
    except InfeasibleError:
        return False
    return True


@settings(derandomize=True, max_examples=100, deadline=None)
@given(problems())
def test_curves_hold_the_best_schedule_of_every_size(problem: Schedule) -> None:
    found = curve(replace(problem, budget=0.0))
    S, T = problem.forced.shape
    assert found.distortion.shape == (S, T + 1)
    assert found.computed.shape == (S, T + 1, T)
    assert (found.distortion[:, 0] == INF).all()
    masks = (np.arange(2**T)[:, None] >> np.arange(T)) & 1 == 1
    for site in range(S):
        costs = distortions(problem, masks, np.full(len(masks), site))
        for keys in range(1, T + 1):
            best = costs[masks.sum(1) == keys].min()
            assert found.distortion[site, keys] == pytest.approx(best, rel=1e-9)
            if best < INF:
                chosen = found.computed[site, keys]
                assert chosen.sum() == keys
                again = distortions(problem, chosen[None], np.array([site]))
                assert again[0] == pytest.approx(best, rel=1e-9)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_forecasts_that_hold_change_nothing(seed: int, T: int) -> None:
    rng = np.random.default_rng(seed)
    hold = rng.random((3, T, T + 1))
    forecast = np.broadcast_to(hold[:, None], (3, T, T, T + 1)).copy()
    forced = rng.random((3, T)) < 0.2
    held = Schedule(np.ones(3), np.zeros(3), hold, None, forced, 3.0 * T)
    two = replace(held, forecast=forecast)
    for exact in (True, False):
        one = curve(held)
        other = curve(two, exact=exact)
        np.testing.assert_allclose(other.distortion, one.distortion, rtol=1e-12)
        assert (other.computed == one.computed)[np.isfinite(one.distortion)].all()


def test_more_budget_never_hurts() -> None:
    rng = np.random.default_rng(1)
    features = np.cumsum(rng.normal(size=(4, 16)), 1)
    for two in (False, True):
        hold = np.concatenate([hold_costs(lags(f)) for f in features])
        forecast = np.concatenate([forecast_costs(lines(f)) for f in features])
        problem = Schedule(
            np.array([1.0, 2.0, 2.0, 3.0]),
            np.zeros(4),
            hold,
            forecast if two else None,
            np.zeros((4, 16), dtype=bool),
            0.0,
        )
        found = [
            ShortestPath("dynamic")(replace(problem, budget=float(budget)))
            for budget in range(8, 8 * 16 + 1, 5)
        ]
        assert all(b.value <= a.value for a, b in pairwise(found))
        full = ShortestPath()(replace(problem, budget=8.0 * 16))
        assert full.value == 0


@pytest.mark.parametrize(
    ("keys", "limits", "best", "value"),
    [
        (3, {}, [0, 4, 6], 22),
        (4, {"longest": 4}, [0, 3, 5, 7], 14),
        (4, {"shortest": 2, "longest": 4}, [0, 2, 4, 6], 16),
        (3, {"shortest": 2, "longest": 4}, [0, 4, 6], 22),
    ],
)
def test_ordered_partitions(keys: int, limits: Any, best: list[int], value: float) -> None:
    problem = one_site(TRIANGULAR, 8, **limits)
    found = EqualKeys(keys)(problem)
    assert (keys_of(found), found.value, found.rate) == (best, value, keys)
    under_budget = ShortestPath()(replace(problem, budget=float(keys)))
    assert under_budget.value <= value
    assert under_budget.gap == 0


def test_partitions_that_lengths_rule_out() -> None:
    problem = one_site(TRIANGULAR, 8, longest=4)
    with pytest.raises(InfeasibleError, match="smallest possible number is 2, the largest 8"):
        EqualKeys(1)(problem)
    with pytest.raises(InfeasibleError, match="the smallest feasible budget is 2"):
        ShortestPath()(replace(problem, budget=1.0))
    with pytest.raises(InfeasibleError, match="the smallest feasible budget is 2"):
        EqualKeys()(replace(problem, budget=1.0))
    with pytest.raises(InfeasibleError, match="the smallest feasible budget is 4"):
        EqualKeys(4)(replace(problem, budget=3.0))
    assert EqualKeys()(replace(problem, budget=3.0)).rate == 3
    with pytest.raises(InfeasibleError, match="Site 0 has no schedule"):
        ShortestPath()(one_site(TRIANGULAR[:7], 7, shortest=4, longest=4))
    with pytest.raises(InfeasibleError, match="No number of computations"):
        EqualKeys()(one_site(TRIANGULAR[:7], 7, shortest=4, longest=4))


@pytest.mark.parametrize(
    ("keys", "held", "value", "forecast", "less"),
    [
        (3, [0, 5, 7], 56, [0, 1, 5], 58),
        (4, [0, 4, 6, 8], 36, [0, 1, 4, 6], 23),
        (5, [0, 3, 5, 7, 8], 23, [0, 1, 3, 5, 7], 11),
    ],
)
def test_squares(
    keys: int, held: list[int], value: float, forecast: list[int], less: float
) -> None:
    found = EqualKeys(keys)(one_site(SQUARES, 9))
    assert (keys_of(found), found.value) == (held, value)
    found = EqualKeys(keys)(one_site(SQUARES, 9, two=True, forced=(0, 1)))
    assert (keys_of(found), found.value) == (forecast, less)


def test_one_predecessor_is_not_enough() -> None:
    problem = one_site(COUNTER_EXAMPLE, 4, two=True, forced=(0, 1))
    exact, paper = EqualKeys(4)(problem), EqualKeys(4, exact=False)(problem)
    assert (keys_of(exact), exact.value) == ([0, 1, 3, 4], 4)
    assert (keys_of(paper), paper.value) == ([0, 1, 2, 5], 5)
    assert "DPCache" in paper.status
    exact, paper = ShortestPath()(problem), ShortestPath(exact=False)(problem)
    assert (keys_of(exact), exact.value, exact.gap) == ([0, 1, 3, 4], 4, 0)
    assert (paper.value, paper.bound, paper.gap) == (5, None, None)
    assert "DPCache" in paper.status


def test_lines_are_forecast_without_error() -> None:
    problem = one_site(3 * np.arange(12.0) - 5, 2, two=True, forced=(0, 1))
    found = ShortestPath()(problem)
    assert (keys_of(found), found.value) == ([0, 1], 0)


@pytest.mark.parametrize("limit", [1, 300, 2**23])
def test_sites_in_chunks_are_sites_at_once(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    hold, forecast = rng.random((5, 6, 7)), rng.random((5, 6, 6, 7)).astype(np.float32)
    forced = rng.random((5, 6)) < 0.2
    problem = Schedule(np.ones(5), np.zeros(5), hold, forecast, forced, 15.0)
    best = ShortestPath("dynamic")(problem)
    monkeypatch.setattr(paths, "_STATES", limit)
    assert (ShortestPath("dynamic")(problem).choice == best.choice).all()


def test_entries_out_of_order_are_never_read() -> None:
    rng = np.random.default_rng(3)
    T = 7
    hold, forecast = rng.random((2, T, T + 1)), rng.random((2, T, T, T + 1))
    problem = Schedule(np.ones(2), np.zeros(2), hold, forecast, np.zeros((2, T), dtype=bool), 8.0)
    step = np.arange(T + 1)
    later = step > step[:T, None]
    poisoned = replace(
        problem,
        hold=np.where(later, hold, np.nan),
        forecast=np.where(later[:, :T, None] & later, forecast, np.nan),
    )
    for solver in (ShortestPath(), ShortestPath(exact=False), EqualKeys(3), Brute()):
        assert (solver(poisoned).choice == solver(problem).choice).all()


def test_the_multiplier_is_told() -> None:
    hold = np.concatenate([hold_costs(lags(f)) for f in (SQUARES, 2 * SQUARES)])
    problem = Schedule(np.ones(2), np.zeros(2), hold, None, np.zeros((2, 9), dtype=bool), 9.0)
    status = ShortestPath()(problem).status
    assert re.search(r"One more percent of computation would save about \S+\.$", status)
    assert "percent of computation" not in ShortestPath()(replace(problem, budget=18.0)).status


def test_segments() -> None:
    costs = np.arange(9.0).reshape(3, 3)
    hold = hold_costs(costs)
    assert hold[0].tolist() == [INF, 0, 1, 3]
    assert hold[1].tolist() == [INF, INF, 0, 5]
    assert hold_costs(costs, shortest=2, longest=2)[0].tolist() == [INF, INF, 1, INF]
    path = forecast_costs(np.broadcast_to(costs, (3, 3, 3)))
    assert path[0, 1].tolist() == [INF, INF, 0, 5]
    assert (path[1, 1] == INF).all()
    unmeasured = np.where(np.eye(3, k=2) > 0, INF, costs)
    assert hold_costs(unmeasured)[0].tolist() == [INF, 0, 1, INF]
    with pytest.raises(InputError, match="expected 1 <= shortest"):
        hold_costs(costs, shortest=0)
    with pytest.raises(InputError, match="3 to 2 steps"):
        hold_costs(costs, shortest=3, longest=2)
    with pytest.raises(InputError, match="shape"):
        hold_costs(costs[:2])


def test_relative_change() -> None:
    distance = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 2.0], [0.0, 2.0, 0.0]])
    change = relative(distance, np.array([2.0, 4.0, 0.0]))
    assert change[0].tolist() == [0, 0.25, 0]
    assert change[1].tolist() == [0.5, 0, INF]


class TestRefusals:
    problem = one_site(SQUARES, 5, two=True)

    @pytest.mark.parametrize("solver", [ShortestPath(), EqualKeys(2), Brute()])
    @pytest.mark.parametrize(
        ("field", "place", "wrong"),
        [
            ("rate", (0,), -1.0),
            ("base", (0,), INF),
            ("hold", (0, 1, 3), np.nan),
            ("hold", (0, 1, 3), -1.0),
            ("forecast", (0, 1, 3, 5), np.nan),
        ],
    )
    def test_unusable_numbers(self, solver: Any, field: str, place: Any, wrong: float) -> None:
        numbers = getattr(self.problem, field).copy()
        numbers[place] = wrong
        with pytest.raises(ProfileError, match=f"Site 0 has .*{field}"):
            solver(replace(self.problem, **{field: numbers}))

    def test_shapes(self) -> None:
        with pytest.raises(InputError, match=r'"hold" has shape \(1, 9\), expected \(1, 9, 10\)'):
            ShortestPath()(replace(self.problem, hold=np.zeros((1, 9))))
        with pytest.raises(InputError, match="forced steps have shape"):
            ShortestPath()(replace(self.problem, forced=np.zeros(9, dtype=bool)))

    def test_budgets(self) -> None:
        with pytest.raises(InputError, match="The budget is nan"):
            ShortestPath()(replace(self.problem, budget=np.nan))
        with pytest.raises(InfeasibleError, match="the smallest feasible budget is 1"):
            ShortestPath()(replace(self.problem, budget=0.5))
        with pytest.raises(InputError, match="choose one of milp"):
            ShortestPath("cplex")(self.problem)
        with pytest.raises(InputError, match="Trying every choice"):
            Brute(limit=100)(self.problem)
