"""From a profile of a tiny diffusion pipeline to plans, their proof, and their pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cacheplan import api
from cacheplan.budget import parse_bytes, parse_compute_budget
from cacheplan.errors import (
    InfeasibleError,
    InputError,
    ModelMismatchError,
    UnsupportedError,
)
from cacheplan.picture_verification import PictureVerification
from cacheplan.plans.compute import full_flops, planned_flops
from cacheplan.plans.io import dumps
from cacheplan.types import FeaturePlan, FeatureProfile


@pytest.fixture(scope="module")
def profile(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureProfile:
    found = api.profile(
        str(tiny_shapes),
        out=tmp_path_factory.mktemp("profile") / "profile.safetensors",
        settings=json.loads((tiny_shapes.parent / "settings.json").read_text()),
        prompts=tiny_shapes.parent / "calibration.txt",
        ablate=1,
    )
    assert isinstance(found, FeatureProfile)
    return found


@pytest.fixture(scope="module")
def plan(profile: FeatureProfile) -> FeaturePlan:
    return api.solve(profile, budget=0.5)


@pytest.fixture
def heldout(tiny_shapes: Path) -> Path:
    return tiny_shapes.parent / "heldout.jsonl"


@pytest.mark.parametrize("recipe", ["planned", "uniform", "taylorseer", "dpcache", "easycache"])
def test_plans_compute_within_their_budget(profile: FeatureProfile, recipe: str) -> None:
    plan = api.solve(profile, budget="80%", recipe=recipe, command="again")
    assert plan.recipe == recipe
    assert plan.budget.asked == "80%"
    assert plan.budget.reached <= 0.8 + 1e-9
    if plan.gate is None:
        reached = planned_flops(plan) / full_flops(plan.model)
        assert plan.budget.reached == pytest.approx(reached)
    assert plan.predicted is not None
    assert plan.provenance.profile == profile.digest
    assert plan.provenance.command == "again"
    assert dumps(plan) == dumps(api.solve(profile, budget="80%", recipe=recipe, command="again"))


@pytest.mark.parametrize(
    ("text", "kept"), [("0.4", 0.4), ("40%", 0.4), ("2.5x", 0.4), ("1e-1", 0.1), ("1", 1.0)]
)
def test_budgets_of_computation(text: str, kept: float) -> None:
    found = parse_compute_budget(text)
    assert found.kept == pytest.approx(kept)
    assert found.asked == text
    assert found.length is None


@pytest.mark.parametrize(
    ("budget", "error", "sentence"),
    [
        ("0", InputError, "more than 0"),
        ("0x", InputError, "more than 0"),
        ("2", InputError, "at most 1"),
        ("0.5x", InputError, "at most 1"),
        ("-1", InputError, "not understood"),
        ("512tok", InputError, "unit for caches of language models"),
        ("2GiB", InputError, "unit for caches of language models"),
        ("3.2bits", InputError, "unit for caches of language models"),
        ("3parsec", InputError, 'unknown unit "parsec"'),
        ("0.001", InfeasibleError, "smallest feasible"),
    ],
)
def test_bad_budgets(
    profile: FeatureProfile, budget: str, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        api.solve(profile, budget=budget)
    assert sentence in str(caught.value)


def test_memory_has_a_unit() -> None:
    assert parse_bytes("64MiB") == 64 * 2**20
    assert parse_bytes("1.5 KB") == 1500
    for text in ("64", "64tok", "much"):
        with pytest.raises(InputError, match="write something like"):
            parse_bytes(text)


def test_recipes_and_options_of_the_other_family(profile: FeatureProfile) -> None:
    with pytest.raises(InputError, match='"snapkv" is for'):
        api.solve(profile, budget=0.5, recipe="snapkv")
    with pytest.raises(InputError, match='did you mean "taylorseer"'):
        api.solve(profile, budget=0.5, recipe="taylorser")
    for option in ("solver", "length", "decode_every"):
        with pytest.raises(InputError, match=f"--{option.replace('_', '-')} is for language"):
            api.solve(profile, budget=0.5, **{option: 3})  # type: ignore[call-overload]


def test_a_plan_that_computes_all_verifies_as_undamaged(
    profile: FeatureProfile, heldout: Path
) -> None:
    plan = replace(api.solve(profile, budget=0.9, recipe="uniform"), entries=())
    found = api.verify(plan, prompts=heldout)
    assert found.error_per_prompt == (0.0, 0.0)
    assert found.damage.psnr == 100
    assert found.damage.ssim == pytest.approx(1)
    assert found.counted_flops == found.full_flops
    assert found.measured_bytes == found.planned_bytes == 0


@pytest.mark.parametrize("recipe", ["planned", "fora", "dpcache"])
def test_verified_flops_are_the_planned_ones(
    profile: FeatureProfile, heldout: Path, recipe: str
) -> None:
    plan = api.solve(profile, budget=0.6, recipe=recipe)
    found = api.verify(plan, prompts=heldout, limit=1)
    assert found.counted_flops == found.planned_flops == planned_flops(plan) < found.full_flops
    assert 0 < found.measured_bytes <= found.planned_bytes
    assert found.damage.error > 0
    assert found.damage.psnr is not None
    assert found.damage.psnr < 100
    assert found.damage.prompts == 1
    assert found.seconds > 0


def test_verifying_on_calibration_prompts_is_refused(plan: FeaturePlan, tiny_shapes: Path) -> None:
    with pytest.raises(InputError, match="calibrated on"):
        api.verify(plan, prompts=tiny_shapes.parent / "calibration.txt")
    with pytest.raises(InputError, match="--split is for language"):
        api.verify(plan, split=0.5)


def test_comparing_measures_what_verifying_does(
    profile: FeatureProfile, plan: FeaturePlan, heldout: Path
) -> None:
    other = api.solve(profile, budget=0.5, recipe="uniform")
    together = api.compare([plan, other], prompts=heldout)
    assert [len(row.pictures) for row in together.rows] == [3, 3]
    assert [row.prompt.seed for row in together.rows] == [5, 2]
    alone, beside = api.verify(other, prompts=heldout), together.found[1]
    assert isinstance(beside, PictureVerification)
    assert beside.damage == alone.damage
    assert beside.error_per_prompt == alone.error_per_prompt
    stranger = replace(other, model=replace(other.model, digest="sha256:" + "1" * 64))
    with pytest.raises(ModelMismatchError, match="digest"):
        api.compare([plan, stranger], prompts=heldout)


def test_drawing_reports_what_it_took(plan: FeaturePlan) -> None:
    drawn = api.draw(plan, prompt="two red rings", seed=4)
    assert drawn.picture.size == (64, 64)
    assert (drawn.prompt, drawn.seed, drawn.steps) == ("two red rings", 4, 8)
    assert drawn.planned_share == drawn.done_share == pytest.approx(plan.budget.reached)
    assert 0 < drawn.measured_bytes <= drawn.planned_bytes
    assert drawn.path == "naive"
    again = api.draw(plan, arguments={"prompt": "two red rings"}, seed=4)
    assert again.picture.tobytes() == drawn.picture.tobytes()


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({}, InputError, "brings no heldout prompts"),
        ({"prompt": " "}, InputError, "The prompt is empty"),
        ({"prompt": "a", "arguments": {}}, InputError, "Both a prompt and arguments"),
        ({"arguments": {"prompt": "a", "size": 3}}, InputError, "takes no size"),
        ({"arguments": {"prompt": ["a", "b"]}}, UnsupportedError, "made 2 pictures"),
        ({"prompt": "a", "settings": {"steps": 9}}, InputError, "no setting steps"),
        (
            {"prompt": "a", "settings": {"num_inference_steps": 9}},
            ModelMismatchError,
            "call setting num_inference_steps is 8",
        ),
        ({"prompt": "a", "cache_memory": 10}, UnsupportedError, "cache_memory allows 10"),
        ({"prompt": "a", "model": "shapes"}, ModelMismatchError, "of shapes is"),
        ({"prompt": "a", "model": "no/such"}, InputError, "could not be loaded"),
    ],
)
def test_what_cannot_be_drawn(
    plan: FeaturePlan, options: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        api.draw(plan, **options)
    assert sentence in str(caught.value)


def test_another_scheduler_is_refused(plan: FeaturePlan, tiny_shapes: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    pipe = DiffusionPipeline.from_pretrained(tiny_shapes)
    pipe.scheduler = EulerDiscreteScheduler()
    pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelMismatchError, match="scheduler setting"):
        api.draw(plan, prompt="a", model=str(tmp_path / "other"))
