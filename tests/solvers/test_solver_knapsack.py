"""The knapsack solvers against every choice tried, golden vectors, and refusals."""

from __future__ import annotations

import ctypes
import math
import os
import re
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from cacheplan.errors import InfeasibleError, InputError, ProfileError
from cacheplan.solvers.brute import Brute
from cacheplan.solvers.certify import verdict
from cacheplan.solvers.dynamic import Dynamic
from cacheplan.solvers.feasible import checked_knapsack
from cacheplan.solvers.hull import lower_hull
from cacheplan.solvers.lagrangian import Lagrangian, Relaxed, relax
from cacheplan.solvers.milp import Milp
from cacheplan.solvers.quiet import quiet
from cacheplan.solvers.registry import KNAPSACK, KnapsackSolver, knapsack_solver
from cacheplan.types.problem import Floats, Knapsack, Solution

INF = np.inf
SOLVERS: list[KnapsackSolver] = [Milp(), Milp(gap=0.0), Dynamic(), Dynamic(units=7), Lagrangian()]
# three sites whose errors for rates 0 to 4 are known; the second is not convex
ERRORS = np.array([[10, 6, 3, 2, 1.5], [8, 7, 2, 1, 0.5], [4, 3.5, 3.2, 3.1, 3.0]])
STEPS = np.tile(np.arange(5.0), (3, 1))


def feasible(problem: Knapsack, solution: Solution) -> None:
    """The solution is what it says, within the budget, and its bound is on the right side."""
    sites = np.arange(len(problem.rate))
    rate = problem.rate[sites, solution.choice].sum()
    value = problem.distortion[sites, solution.choice].sum()
    assert solution.rate == pytest.approx(rate, rel=1e-12)
    assert solution.rate <= problem.budget * (1 + 1e-9)
    assert solution.value == pytest.approx(value, rel=1e-12)
    assert solution.bound is not None
    assert 0 <= solution.bound <= solution.value
    assert solution.gap is not None
    assert solution.gap >= 0
    assert solution.status.endswith(".")


@st.composite
def problems(draw: st.DrawFn) -> Knapsack:
    """Small problems: lattices with ties, scattered rates, many magnitudes, missing options."""
    sites, options = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    shape = sites, options
    kind = draw(st.sampled_from(["integers", "fractions", "magnitudes", "correlated"]))
    rate: Floats = rng.integers(0, 8, shape).astype(np.float64)
    distortion: Floats = rng.integers(0, 10, shape).astype(np.float64)
    if kind == "fractions":
        rate = rate / 10 / sites
    elif kind == "magnitudes":
        rate, distortion = rng.random(shape), 10 ** rng.normal(-4, 2, shape)
    elif kind == "correlated":
        rate = rng.integers(1, 10**9, shape).astype(np.float64)
        distortion = 1e9 - rate + distortion
    missing = rng.random(shape) < 0.1
    missing[:, 0] = False
    rate[missing] = INF
    low = rate.min(1).sum()
    high = np.where(missing, 0, rate).max(1).sum()
    return Knapsack(rate, distortion, low + draw(st.sampled_from([0, 0.2, 0.5, 1])) * (high - low))


@settings(derandomize=True, max_examples=200, deadline=None)
@given(problems())
def test_every_solver_keeps_its_claims(problem: Knapsack) -> None:
    best = Brute()(problem)
    feasible(problem, best)
    assert best.gap == 0
    for solver in SOLVERS:
        solution = solver(problem)
        feasible(problem, solution)
        assert solution.bound is not None
        assert solution.bound <= best.value * (1 + 1e-12)
        assert solution.value >= best.value * (1 - 1e-12)
        if solution.status.startswith("Optimal"):
            assert solution.value <= best.value * (1 + 1e-4)
        if isinstance(solver, Milp):
            assert solution.status.startswith("Optimal")
            assert solution.gap is not None
            assert solution.gap <= max(solver.gap, 1e-6)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_dynamic_is_exact_on_integers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rate = rng.integers(0, 30, (4, 5)).astype(np.float64)
    problem = Knapsack(rate, rng.random((4, 5)), float(rate.min(1).sum() + rng.integers(0, 40)))
    solution = Dynamic(units=200)(problem)
    assert solution.value == pytest.approx(Brute()(problem).value, rel=1e-12)
    assert solution.status.startswith("Optimal: proven by dynamic programming, exact")
    assert solution.gap == 0


@pytest.mark.parametrize("solver", [Milp(gap=0.0), Dynamic(), Brute()])
@pytest.mark.parametrize(
    ("budget", "best", "value"),
    [
        (3, [[1, 2, 0]], 12),
        (4, [[2, 2, 0]], 9),
        (5, [[2, 3, 0], [3, 2, 0]], 8),
        (6, [[3, 3, 0]], 7),
    ],
)
def test_golden_allocation(solver: Any, budget: int, best: list[list[int]], value: float) -> None:
    solution = solver(Knapsack(STEPS, ERRORS, float(budget)))
    assert solution.choice.tolist() in best
    assert solution.value == value
    assert solution.rate == budget
    assert solution.status.startswith("Optimal")


def test_the_bound_is_at_least_the_linear_program() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        rate, distortion = rng.random((6, 5)), rng.random((6, 5))
        budget = rate.min(1).sum() + 0.4 * np.ptp(rate, axis=1).sum()
        program = linprog(
            distortion.ravel(),
            A_ub=rate.reshape(1, -1),
            b_ub=[budget],
            A_eq=np.kron(np.eye(6), np.ones(5)),
            b_eq=np.ones(6),
        )
        problem = Knapsack(rate, distortion, budget)
        relaxed = relax(checked_knapsack(problem))
        assert program.fun is not None
        assert program.fun * (1 - 1e-7) <= relaxed.bound <= Brute()(problem).value


def test_the_core_holds_every_better_choice() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        rate = rng.integers(0, 9, (4, 5)).astype(np.float64)
        problem = Knapsack(rate, rng.random((4, 5)), float(rate.min(1).sum() + 6))
        best, relaxed = Brute()(problem), relax(checked_knapsack(problem))
        if best.value < relaxed.value * (1 - 1e-9):
            assert relaxed.core[np.arange(4), best.choice].all()


def large(budget: float) -> Knapsack:
    rng = np.random.default_rng(0)
    keeps = np.array([0.05, 0.1, 0.2, 0.35, 0.6, 1.0])
    weight = 10 ** rng.normal(-4, 1, (64, 1))
    noise = np.exp(rng.normal(0, 0.2, (64, 6)))
    distortion = weight * np.exp(-rng.uniform(2, 12, (64, 1)) * keeps) * (1 - keeps) * noise
    return Knapsack(np.tile(keeps / 64, (64, 1)), distortion, budget)


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.3, 0.7, 1.0, 5.0, INF])
def test_large_problems_agree(budget: float) -> None:
    problem = large(budget)
    solutions = [solver(problem) for solver in SOLVERS]
    for solution in solutions:
        feasible(problem, solution)
    assert max(s.bound or 0.0 for s in solutions) <= min(s.value for s in solutions) * (1 + 1e-12)
    assert all(s.gap is not None and s.gap < 0.02 for s in solutions)
    again = Milp()(problem)
    assert again.choice.tolist() == solutions[0].choice.tolist()


def test_more_budget_never_hurts() -> None:
    values = [Milp(gap=0.0)(large(budget)).value for budget in np.linspace(0.05, 1, 12)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(values))


@pytest.mark.parametrize("bound", [None, -INF])
def test_out_of_time_falls_back_on_the_lagrangian(
    bound: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = SimpleNamespace(status=1, x=None, mip_dual_bound=bound)
    monkeypatch.setattr("scipy.optimize.milp", lambda *_, **__: stopped)
    problem, lagrangian = large(0.1), Lagrangian()(large(0.1))
    solution = Milp(gap=0.0, seconds=3)(problem)
    feasible(problem, solution)
    assert solution.choice.tolist() == lagrangian.choice.tolist()
    assert solution.status.endswith("of the best choice by HiGHS, stopped after 3 s.")
    assert solution.bound == lagrangian.bound


def test_a_choice_above_the_budget_is_not_taken() -> None:
    rate, distortion = np.tile([0.0, 1.0], (8, 1)), np.tile([1.0, 0.0], (8, 1))
    problem = Knapsack(rate, distortion, 2.0)
    none, all_, three = np.zeros(8, np.int64), np.ones(8, np.int64), np.array([1] * 3 + [0] * 5)
    relaxed = Relaxed(problem, 1.0, 6.0, np.zeros((8, 2)), none, 8.0)
    assert relaxed.best(all_).sum() == 0  # six too many: no exchange of two leads back
    assert relaxed.best(all_, three).sum() == 2


def test_budgets_at_the_corners_of_the_hull() -> None:
    # the relaxation is then integral, and its core no wider than rounding
    rng = np.random.default_rng(5)
    for _ in range(60):
        rate, distortion = rng.random((6, 5)), rng.random((6, 5))
        hull = lower_hull(rate, distortion)
        choice = hull.start.copy()
        choice[hull.site[:4]] = hull.option[:4]
        problem = Knapsack(rate, distortion, float(rate[np.arange(6), choice].sum()))
        value = distortion[np.arange(6), choice].sum()
        for solver in SOLVERS:
            assert solver(problem).value == pytest.approx(value, rel=1e-9)


@pytest.mark.skipif(os.name != "posix", reason="C's standard output is found by the linker")
def test_what_c_code_prints_does_not_reach_standard_output(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with quiet():
        ctypes.CDLL(None).puts(b"noise")
    print("result", flush=True)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("result\n", "noise\n")


@settings(derandomize=True, max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_two_exact_methods_agree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rate = rng.integers(0, 40, (20, 8)) / 640
    problem = Knapsack(rate, 10 ** rng.normal(-3, 1, (20, 8)), rate.min(1).sum() + 3.1)
    counted, searched = Dynamic()(problem), Milp(gap=0.0)(problem)
    assert counted.gap == 0
    assert searched.value == pytest.approx(counted.value, rel=1e-9)


def test_equal_shares_fit_a_budget_that_rounding_would_refuse() -> None:
    rate = np.full((11, 1), 0.2 / 11)
    assert math.fsum(rate[:, 0]) > 0.2
    for solver in SOLVERS:
        assert solver(Knapsack(rate, np.ones((11, 1)), 0.2)).value == 11


def test_a_budget_of_nothing() -> None:
    rate, distortion = np.array([[0.0, 0.5], [0.0, 1.0]]), np.array([[2.0, 1.0], [3.0, 0.0]])
    for solver in SOLVERS:
        solution = solver(Knapsack(rate, distortion, 0.0))
        assert (solution.value, solution.rate) == (5.0, 0.0)


@pytest.mark.parametrize("name", KNAPSACK)
class TestRefusals:
    def test_infeasible_names_the_smallest_budget(self, name: str) -> None:
        rate = np.array([[0.1, 0.7], [0.2, INF], [0.3, 0.4]]) / 3
        with pytest.raises(InfeasibleError, match="the smallest feasible budget is") as caught:
            knapsack_solver(name)(Knapsack(rate, np.ones((3, 2)), 0.15))
        found = re.search(r"budget is (\S+)\.$", str(caught.value))
        assert found
        solution = knapsack_solver(name)(Knapsack(rate, np.ones((3, 2)), float(found[1])))
        assert solution.choice.tolist() == [0, 0, 0]

    @pytest.mark.parametrize("field", ["rate", "distortion"])
    @pytest.mark.parametrize("wrong", [np.nan, -1.0])
    def test_unusable_numbers_name_the_site(self, name: str, field: str, wrong: float) -> None:
        numbers = {"rate": np.ones((3, 2)), "distortion": np.ones((3, 2))}
        numbers[field][1, 1] = wrong
        with pytest.raises(ProfileError, match=f"Site 1 has {field}s that are NaN or negative"):
            knapsack_solver(name)(Knapsack(**numbers, budget=3.0))

    def test_a_site_without_options(self, name: str) -> None:
        rate = np.array([[1.0, 2.0], [INF, 1.0]])
        distortion = np.array([[1.0, 2.0], [1.0, INF]])
        with pytest.raises(ProfileError, match="Site 1 has no option"):
            knapsack_solver(name)(Knapsack(rate, distortion, 3.0))

    @pytest.mark.parametrize("budget", [np.nan, -1.0])
    def test_no_budget(self, name: str, budget: float) -> None:
        with pytest.raises(InputError, match="The budget is"):
            knapsack_solver(name)(Knapsack(np.ones((1, 1)), np.ones((1, 1)), budget))

    def test_shapes(self, name: str) -> None:
        with pytest.raises(InputError, match="expected the same"):
            knapsack_solver(name)(Knapsack(np.ones((1, 2)), np.ones((1, 1)), 1.0))


@pytest.mark.parametrize(
    ("gap", "status"),
    [
        (0.0, "Optimal: proven by hand."),
        (1e-9, "Optimal: proven within 0.0001 % by hand."),
        (1e-4, "Optimal: proven within 0.01 % by hand."),
        (0.000341, "Feasible: proven within 0.035 % of the best choice by hand."),
        (1.5, "Feasible: proven within 150 % of the best choice by hand."),
    ],
)
def test_verdicts(gap: float, status: str) -> None:
    assert verdict(gap, "hand") == status


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(InputError, match="choose one of milp, dynamic, lagrangian, brute"):
        knapsack_solver("cplex")


def test_large_problems_are_refused_by_brute() -> None:
    with pytest.raises(InputError, match="use another solver"):
        Brute()(large(0.5))


def test_units() -> None:
    with pytest.raises(InputError, match="0 units"):
        Dynamic(units=0)(large(0.5))
