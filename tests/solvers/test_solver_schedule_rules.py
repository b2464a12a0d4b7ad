"""Greedy rules: golden masks, thresholds fitted to budgets, presets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.errors import InfeasibleError, InputError, ProfileError
from cacheplan.solvers.lookahead import LookAhead
from cacheplan.solvers.schedule import Mask
from cacheplan.solvers.segments import hold_costs
from cacheplan.solvers.steps_mask import POLICIES, StepsMask, steps_mask
from cacheplan.solvers.threshold import Magnitude, Threshold
from cacheplan.types import Schedule
from cacheplan.types.problem import Floats

RULES: list[Any] = [LookAhead(), Threshold(), Magnitude(), Magnitude(variant="repository")]


def schedule(change: Floats, *, budget: float = np.inf, ratios: Floats | None = None) -> Schedule:
    """Sites of rate 1 whose distortions are their changes, `[S, T, T]`."""
    S, T, _ = change.shape
    return Schedule(
        rate=np.ones(S),
        base=np.zeros(S),
        hold=hold_costs(change),
        forecast=None,
        forced=np.zeros((S, T), dtype=bool),
        budget=budget,
        change=change,
        ratios=np.ones((S, T)) if ratios is None else ratios,
    )


def steady(T: int, step: float = 0.0) -> Schedule:
    """One site that changes by `step` with each step."""
    t = np.arange(T)
    return schedule(step * np.abs(t[:, None] - t)[None].astype(float))


def drifting(seed: int, budget: float, S: int = 3, T: int = 20) -> Schedule:
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.normal(size=(S, T)) * np.exp(rng.normal(size=(S, T))), 1)
    ratios = np.exp(-0.05 * rng.random((S, T)))
    return schedule(np.abs(walk[:, :, None] - walk[:, None]), budget=budget, ratios=ratios)


def bits(mask: Mask) -> str:
    return "".join("01"[int(step)] for step in mask)


def test_look_ahead_goes_as_far_as_it_may() -> None:
    still = steady(12)
    assert bits(LookAhead(0.0).rule(still, 0.0)[0]) == "100010001000"
    assert bits(LookAhead(0.0, ahead=1).rule(still, 0.0)[0]) == "101010101010"
    assert bits(LookAhead(-1.0).rule(still, -1.0)[0]) == "1" * 12
    last = replace(still, forced=np.arange(12)[None] == 11)
    assert LookAhead(0.0)(last).choice[0].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1]
    # only the far end counts: step 1 is far from step 0, step 2 is back at it
    back = np.array([[[0.0, 9, 0, 9], [9, 0, 9, 9], [0, 9, 0, 9], [9, 9, 9, 0]]])
    found = LookAhead(1.0)(schedule(back))
    assert found.choice[0].tolist() == [1, 0, 0, 1]
    assert found.value == 9
    assert (found.bound, found.gap) == (None, None)
    assert found.status == "SmoothCache with the threshold 1, as given."


def test_threshold_looks_at_the_last_computed_step() -> None:
    moving = steady(10, 1.0)
    assert bits(Threshold().rule(moving, 3.0)[0]) == "1001001001"  # strictly below
    assert bits(Threshold().rule(moving, 3.1)[0]) == "1000100010"
    forced = replace(moving, forced=np.arange(10)[None] == 5)
    assert Threshold(3.1)(forced).choice[0].tolist() == [1, 0, 0, 0, 1, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("ratio", "mask", "count"),
    [
        (1.0, "111111" + "0001" * 5 + "00", 11),
        (0.98, "111111" + "001" * 7 + "0", 13),
        (0.97, "111111" + "01" * 11, 17),
    ],
)
def test_magnitudes(ratio: float, mask: str, count: int) -> None:
    problem = replace(steady(28), ratios=np.full((1, 28), ratio))
    found = Magnitude(0.06)(problem)
    assert bits(found.choice[0].astype(bool)) == mask
    assert found.rate == count


def test_the_variants_of_magnitudes() -> None:
    # 0.5 + 0.75 is exactly the threshold; 28 * 0.2 = 5.6 steps are computed first
    problem = replace(steady(28), ratios=np.full((1, 28), 0.5))
    here, there = Magnitude(1.25), Magnitude(1.25, variant="repository")
    assert bits(here.rule(problem, 1.25)[0]) == "111111" + "001" * 7 + "0"
    assert bits(there.rule(problem, 1.25)[0]) == "11111" + "01" * 11 + "0"
    assert bits(Magnitude(retention=0.0).rule(problem, 0.0)[0]) == "1" * 28


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(24, 60), st.sampled_from(RULES))
def test_thresholds_spend_the_budget(seed: int, budget: int, solver: Any) -> None:
    problem = drifting(seed, float(budget))
    found, fitted = solver(problem), solver.fit(problem)
    assert found.rate <= budget
    assert found.rate == fitted.computed.sum()
    assert (found.choice == fitted.computed).all()
    assert f"the threshold {fitted.threshold:.6g}, found by bisection" in found.status
    assert (solver.rule(problem, fitted.threshold) == fitted.computed).all()
    if budget == 60:
        assert fitted.computed.all()
    else:
        assert solver.rule(problem, fitted.threshold * (1 - 1e-8)).sum() > budget
    again = replace(solver, threshold=fitted.threshold)(problem)
    assert (again.choice == found.choice).all()
    assert again.value == pytest.approx(found.value)


@pytest.mark.parametrize("solver", RULES)
def test_ties_leave_part_of_the_budget(solver: Any) -> None:
    # all sites and steps are alike, so any threshold skips at all of them or none
    problem = replace(schedule(np.ones((2, 20, 20)), budget=39.0), ratios=np.full((2, 20), 0.9))
    found = solver(problem)
    assert found.rate <= 39
    assert (found.choice[0] == found.choice[1]).all()


def test_rates_and_unmeasured_changes_count() -> None:
    problem = replace(drifting(0, 0.0), rate=np.array([1.0, 5.0, 2.0]), budget=90.0)
    assert problem.change is not None
    for solver in RULES:
        rate = (solver.fit(problem).computed.sum(1) * problem.rate).sum()
        assert 60 < rate <= 90
    far = np.triu(np.ones((20, 20)), 3) > 0
    limited = replace(problem, change=np.where(far, np.inf, problem.change), budget=1000.0)
    for rule in (LookAhead(1e9), Threshold(1e9)):
        gaps = np.diff(np.flatnonzero(rule(limited).choice[0]))
        assert gaps.max() == 3


def test_what_rules_refuse() -> None:
    problem = drifting(1, 2.0)
    for solver in RULES:
        with pytest.raises(InfeasibleError, match="the smallest feasible budget is"):
            solver(problem)
        with pytest.raises(InfeasibleError, match="with the threshold 0 takes"):
            replace(solver, threshold=0.0)(problem)
    reads = ("change", "change", "ratios", "ratios")
    for solver, name in zip(RULES, reads, strict=True):
        missing: Any = {name: None}
        with pytest.raises(InputError, match=f'needs the schedule\'s "{name}"'):
            solver(replace(problem, **missing))
        unusable: Any = {name: np.full_like(getattr(problem, name), np.nan)}
        with pytest.raises(ProfileError, match=f'"{name}" holds NaN'):
            solver(replace(problem, **unusable))


PRESETS = {
    28: (
        "1111111101110011100110010001",
        "1111110110001100011000110001",
        "1111110100010000100000100001",
        "1111001000001000000100000001",
    ),
    8: ("11111011", "11110101", "11101001", "11001001"),
    9: ("111110111", "111110101", "111101001", "111001001"),
    4: ("1101",) * 4,
    6: ("111001",) * 4,
}


@pytest.mark.parametrize("steps", PRESETS)
def test_presets(steps: int) -> None:
    assert tuple(bits(steps_mask(policy, steps)) for policy in POLICIES) == PRESETS[steps]


def test_presets_for_other_numbers_of_steps() -> None:
    assert [int(steps_mask(policy, 50).sum()) for policy in POLICIES] == [38, 29, 20, 14]
    assert bits(steps_mask("fast", 20)) == "11111101000000000001"
    assert bits(steps_mask("ultra", 20)) == "11110000000000000001"
    for steps in (*range(8, 120), 4, 6):
        for policy in POLICIES:
            mask = steps_mask(policy, steps)
            assert len(mask) == steps
            assert mask[0]
            assert mask[-1]


def test_presets_under_a_budget() -> None:
    problem = replace(steady(28), budget=16.0)
    found = StepsMask()(problem)
    assert (found.rate, found.status) == (15, 'The steps of the preset "medium".')
    assert StepsMask("ultra")(problem).rate == 8
    second = replace(problem, forced=np.arange(28)[None] == 5)
    assert StepsMask("ultra")(second).rate == 9
    call: Callable[[Schedule], Any] = StepsMask()
    with pytest.raises(InfeasibleError, match="the smallest feasible budget is 8"):
        call(replace(problem, budget=7.0))
    with pytest.raises(InputError, match="choose one of slow, medium, fast, ultra"):
        steps_mask("warp", 28)
    with pytest.raises(InputError, match="4, 6, 8 or more steps, not for 7"):
        steps_mask("slow", 7)
