"""Forecast weights fitted to the final latent: numpy's least squares, and never a worse plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from cacheplan.picture_weights import (
    Normal,
    directions,
    fit_weights,
    linearised,
    mean_error,
    moved,
)
from cacheplan.plans.io import read_plan
from cacheplan.types import FeatureAction, FeatureEntry, FeaturePlan, FeatureSite

GOLDEN = Path(__file__).parents[1] / "plans" / "golden_features.json"
PROMPTS, SIZE = 3, 40
WEIGHTS = ((1.5, -0.5), (1.0,), (1.2, -0.3, 0.1))


@pytest.fixture(scope="module")
def plan() -> FeaturePlan:
    """Three steps with weights, and one without."""
    golden = read_plan(GOLDEN)
    assert isinstance(golden, FeaturePlan)
    site = FeatureSite(part="hidden", first=0, last=len(golden.model.blocks))
    actions = [
        FeatureAction(do="forecast", basis="fitted", order=len(w) - 1, weights=w) for w in WEIGHTS
    ]
    entries = [
        FeatureEntry(site=site, step=step, action=action)
        for step, action in enumerate([*actions, FeatureAction(do="reuse")], start=3)
    ]
    return replace(golden, entries=tuple(entries), gate=None)


def flat(plan: FeaturePlan) -> NDArray[np.float64]:
    return np.array([w for entry in plan.entries for w in entry.action.weights])


def pipeline(
    bend: float = 0.0, seed: int = 0
) -> tuple[Callable[[FeaturePlan, int], Tensor], list[Tensor], NDArray[np.float64]]:
    """A made-up pipeline whose latents are linear in the weights but for `bend`."""
    rng = np.random.default_rng(seed)
    matrices = rng.normal(size=(PROMPTS, SIZE, 6))
    full = rng.normal(size=(PROMPTS, SIZE)) * [[1], [5], [0.2]]

    def run(plan: FeaturePlan, index: int) -> Tensor:
        linear = matrices[index] @ flat(plan)
        return torch.tensor(linear + bend * np.abs(linear) ** 3)

    return run, [torch.tensor(target) for target in full], matrices


def test_weights_are_those_of_least_squares(plan: FeaturePlan) -> None:
    """Each prompt's error counts relative to the length of its latent."""
    run, full, matrices = pipeline()
    along = directions(plan)
    assert len(along) == 6
    latents = [run(plan, index) for index in range(PROMPTS)]
    amounts = Normal.of(linearised(plan, along, run, full, latents)).solved(0.0)
    sizes = np.array([float(target.norm()) for target in full])
    stacked = np.concatenate(matrices / sizes[:, None, None])
    wanted = np.concatenate([target / size for target, size in zip(full, sizes, strict=True)])
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
    found = moved(plan, along, amounts.tolist())
    assert flat(found) == pytest.approx(expected, abs=1e-6)
    assert [entry.action.weights for entry in plan.entries[:3]] == list(WEIGHTS)
    assert found.entries[3] == plan.entries[3]


def test_damping_holds_weights_back(plan: FeaturePlan) -> None:
    run, full, _ = pipeline()
    along = directions(plan)
    latents = [run(plan, index) for index in range(PROMPTS)]
    normal = Normal.of(linearised(plan, along, run, full, latents))
    lengths = [
        float(np.sqrt(np.diag(normal.square)) @ np.abs(normal.solved(d))) for d in (0, 0.1, 10, 1e3)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 0.01 * lengths[0]


@given(st.floats(0, 3), st.integers(0, 20), st.floats(0, 0.5))
def test_never_worse_and_always_the_same(
    plan: FeaturePlan, bend: float, seed: int, worth: float
) -> None:
    """Also where runs are far from linear in the weights."""
    run, full, _ = pipeline(bend, seed)
    before = mean_error([run(plan, index) for index in range(PROMPTS)], full)
    found, value = fit_weights(plan, run, full, worth=worth)
    assert value == mean_error([run(found, index) for index in range(PROMPTS)], full)
    assert found == plan or value < before * (1 - worth)
    assert fit_weights(plan, run, full, worth=worth) == (found, value)


def test_what_can_be_reached_is_reached(plan: FeaturePlan) -> None:
    run, _, _ = pipeline()
    goal = moved(plan, directions(plan), [0.3, -0.2, 0.1, 0.05, -0.4, 0.2])
    full = [run(goal, index) for index in range(PROMPTS)]
    told: list[float] = []
    found, value = fit_weights(
        plan, run, full, worth=0.01, rounds=6, better=lambda _, value: told.append(value)
    )
    assert flat(found) == pytest.approx(flat(goal), abs=1e-4)
    assert told == sorted(told, reverse=True)
    assert told[-1] == value


def test_what_prompts_do_not_share_is_left_alone(plan: FeaturePlan) -> None:
    """Each wants another weight changed.  A bit of all would suit them, but no other prompt."""
    run, _, _ = pipeline()
    along = directions(plan)
    goals = [moved(plan, along[i : i + 1], [0.3]) for i in range(4)]

    def same(found: FeaturePlan, index: int) -> Tensor:
        return run(found, 0)

    full = [same(goal, 0) for goal in goals]
    latents = [same(plan, 0)] * 4
    normal = Normal.of(linearised(plan, along, same, full, latents))
    suited = moved(plan, along, normal.solved(0.0).tolist())
    before = mean_error(latents, full)
    assert mean_error([same(suited, 0)] * 4, full) < 0.97 * before
    assert fit_weights(plan, same, full, worth=0.01) == (plan, before)
    assert fit_weights(plan, same, full[:1] * 2, worth=0.01)[1] < 0.1 * before


def test_runs_that_end_in_nan_win_nothing(plan: FeaturePlan) -> None:
    run, full, _ = pipeline()

    def broken(found: FeaturePlan, index: int) -> Tensor:
        return run(found, index) * (1 if found == plan else float("nan"))

    assert fit_weights(plan, broken, full, worth=0.01)[0] == plan


def test_plans_without_weights_stay(plan: FeaturePlan) -> None:
    bare = replace(plan, entries=plan.entries[3:])
    found, value = fit_weights(bare, lambda _, i: torch.ones(4), [torch.ones(4) * 2], worth=0.01)
    assert found is bare
    assert value == 0.5
