"""Closed-loop refinement: never worse, within the budget, resumed where it stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cacheplan import api
from cacheplan.adapters.sampling import run_pipeline
from cacheplan.errors import InputError, UnsupportedError
from cacheplan.formulate_features import plan_for, searched
from cacheplan.picture_inputs import open_for_plan
from cacheplan.picture_refinement import WORTH, computed_steps, halves
from cacheplan.plans.compute import full_flops, planned_flops
from cacheplan.plans.io import dumps, read_plan
from cacheplan.profilers.feature_ablation import relative_square
from cacheplan.profilers.feature_prompts import load_picture_prompts
from cacheplan.recipes import find_feature_recipe
from cacheplan.runtime.features.apply import apply_features
from cacheplan.types import FeaturePlan, FeatureProfile

BUDGET = 0.5
GOLDEN = Path(__file__).parents[1] / "plans" / "golden_plan.json"


@pytest.fixture(scope="module")
def prompts(tiny_shapes: Path) -> Path:
    return tiny_shapes.parent / "calibration.txt"


@pytest.fixture(scope="module")
def profile(
    tiny_shapes: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> FeatureProfile:
    found = api.profile(
        str(tiny_shapes),
        out=tmp_path_factory.mktemp("profile") / "profile.safetensors",
        settings=json.loads((tiny_shapes.parent / "settings.json").read_text()),
        prompts=prompts,
        ablate=1,
    )
    assert isinstance(found, FeatureProfile)
    return found


@pytest.fixture(scope="module")
def poor(profile: FeatureProfile) -> FeaturePlan:
    """All that the budget buys is spent on the first steps: much to improve."""
    even = api.solve(profile, budget=BUDGET, recipe="uniform")
    steps = np.array([[step < 8 - len(even.entries) for step in range(8)]])
    found = plan_for(profile, find_feature_recipe("uniform"), steps, BUDGET)
    assert found is not None
    return replace(even, entries=found.entries)


def measured(plan: FeaturePlan, prompts: Path) -> float:
    """Mean relative error of the final latent, written out."""
    opened = open_for_plan(plan, model=None, settings={}, device=None, dtype=None)
    errors = []
    for prompt in load_picture_prompts(prompts, limit=None):
        arguments = {**opened.call, **prompt.call}
        full = run_pipeline(opened.pipe, arguments, seed=prompt.seed).latent
        with apply_features(opened.pipe, plan):
            latent = run_pipeline(opened.pipe, arguments, seed=prompt.seed).latent
        errors.append(relative_square(latent, full) ** 0.5)
    return float(np.mean(errors))


@pytest.mark.parametrize("recipe", ["uniform", "planned", "fora", "cachequant"])
def test_refining_never_makes_it_worse(profile: FeatureProfile, prompts: Path, recipe: str) -> None:
    plan = api.solve(profile, budget=BUDGET, recipe=recipe)
    refined = api.refine(plan, profile, prompts=prompts, evaluations=12, command="again")
    before, after = measured(plan, prompts), measured(refined, prompts)
    assert after <= before
    assert refined.certificate.value == pytest.approx(after, rel=1e-6)
    words = f"Refined from the measured error {before:.4g} to {after:.4g} on 2 calibration prompts"
    assert refined.certificate.status.startswith(words)
    assert refined.budget.reached <= BUDGET + 1e-9
    assert planned_flops(refined) / full_flops(refined.model) <= BUDGET + 1e-9
    assert refined.recipe == recipe
    assert refined.measured is None
    assert refined.provenance.profile == profile.digest
    assert refined.provenance.command == "again"
    if after < before:
        assert after < before * (1 - WORTH)
        assert refined.entries != plan.entries
    else:
        assert refined.entries == plan.entries


def test_something_is_gained(profile: FeatureProfile, poor: FeaturePlan, prompts: Path) -> None:
    """The counted compute stays; the computed steps move, and their number is the same."""
    refined = api.refine(poor, profile, prompts=prompts)
    assert refined.certificate.value < 0.9 * measured(poor, prompts)
    assert planned_flops(refined) == planned_flops(poor)
    assert "no move of one step improves it." in refined.certificate.status
    again = api.refine(refined, profile, prompts=prompts)  # a refined plan is a plan
    assert again.entries == refined.entries


def test_neighbours_are_made_by_the_planner(profile: FeatureProfile) -> None:
    """A plan's own steps give the plan again: weights, corrections and partial steps."""
    for name in ("planned", "uniform", "taylorseer", "cachequant", "smoothcache", "delta_dit"):
        recipe = find_feature_recipe(name)
        plan = api.solve(profile, budget=0.8, recipe=name)
        schedule, rows = searched(profile, recipe, 0.8)
        steps = computed_steps(plan, rows)
        assert steps.shape == schedule.forced.shape
        made = plan_for(profile, recipe, steps, 0.8)
        assert made is not None
        assert made.reached == pytest.approx(plan.budget.reached)
        assert made.predicted_error == pytest.approx(plan.predicted.error)  # type: ignore[union-attr]
        assert [(e.site, e.step) for e in made.entries] == [(e.site, e.step) for e in plan.entries]
        assert plan_for(profile, recipe, np.ones_like(steps), 0.8) is None  # beyond the budget


def test_an_interrupted_search_goes_on(
    profile: FeatureProfile,
    poor: FeaturePlan,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = api.refine(poor, profile, prompts=prompts, command="c")
    state, runs = tmp_path / "out.json.part", [0]

    def breaking(*args: Any, **kwargs: Any) -> Any:
        runs[0] += 1
        if runs[0] == 12:
            raise KeyboardInterrupt
        return run_pipeline(*args, **kwargs)

    monkeypatch.setattr("cacheplan.picture_refinement.run_pipeline", breaking)
    with pytest.raises(KeyboardInterrupt):
        api.refine(poor, profile, prompts=prompts, state=state)
    tried = json.loads(state.read_text())["tried"]
    assert 1 < len(tried) < 6
    limited = api.refine(poor, profile, prompts=prompts, state=state, evaluations=len(tried))
    assert "stopped before all moves were tried." in limited.certificate.status
    assert state.exists()
    assert json.loads(state.read_text())["tried"] == tried  # nothing was run again
    resumed = api.refine(poor, profile, prompts=prompts, state=state, command="c")
    assert dumps(resumed) == dumps(whole)
    assert not state.exists()


def test_out_of_time_keeps_the_best(
    profile: FeatureProfile, poor: FeaturePlan, prompts: Path, tmp_path: Path
) -> None:
    """The plan itself is always measured, and no other schedule after the time is up."""
    state = tmp_path / "out.json.part"
    refined = api.refine(poor, profile, prompts=prompts, minutes=1e-9, state=state)
    assert refined.entries == poor.entries
    assert "1 schedules run; stopped" in refined.certificate.status
    assert len(json.loads(state.read_text())["tried"]) == 1


def test_what_cannot_be_refined(
    profile: FeatureProfile, poor: FeaturePlan, prompts: Path, tiny_shapes: Path, tmp_path: Path
) -> None:
    gated = api.solve(profile, budget=0.8, recipe="easycache")
    with pytest.raises(UnsupportedError, match='gate "secant" chooses steps while it runs'):
        api.refine(gated, profile, prompts=prompts)
    with pytest.raises(InputError, match="for a language model, but the profile is of a diffusi"):
        api.refine(read_plan(GOLDEN), profile)
    with pytest.raises(InputError, match="not solved from this profile"):
        api.refine(poor, replace(profile, digest="sha256:other"), prompts=prompts)
    with pytest.raises(InputError, match="not the prompts of the profile"):
        api.refine(poor, profile, prompts=tiny_shapes.parent / "heldout.jsonl")
    with pytest.raises(InputError, match="--evaluations is 0, expected at least 1 run"):
        api.refine(poor, profile, prompts=prompts, evaluations=0)
    with pytest.raises(InputError, match="--minutes is 0, expected more than 0"):
        api.refine(poor, profile, prompts=prompts, minutes=0)
    state = tmp_path / "state"
    state.write_text("{}")
    with pytest.raises(InputError, match=r"no interrupted refinement that can be read .*: delete"):
        api.refine(poor, profile, prompts=prompts, state=state)
    state.unlink()
    api.refine(poor, profile, prompts=prompts, state=state, evaluations=1)
    with pytest.raises(InputError, match="of another plan or with other prompts: delete it"):
        api.refine(poor, profile, prompts=prompts, state=state, limit=1)


def test_halves_divide_the_prompts() -> None:
    assert halves(1) == (range(0, 1, 2),)
    for prompts in range(2, 9):
        one, other = halves(prompts)
        assert sorted([*one, *other]) == list(range(prompts))
        assert len(one) - len(other) in (0, 1)
