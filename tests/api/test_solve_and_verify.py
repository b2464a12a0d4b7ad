"""From a real profile of the embedded model to plans, their promises, and their proof."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cacheplan import api
from cacheplan.budget import parse_budget
from cacheplan.errors import (
    InfeasibleError,
    InputError,
    ModelMismatchError,
    ProfileError,
    UnsupportedError,
)
from cacheplan.formulate import formulate, predict, reached
from cacheplan.formulate_bits import chooses_bits
from cacheplan.plans.io import dumps
from cacheplan.plans.rows import kept_rows
from cacheplan.recipes import RECIPES
from cacheplan.types import Knapsack, KVAction, KVProfile, Statistic
from cacheplan.zoo import embedded_prompts


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> KVProfile:
    out = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    found = api.profile(out=out, limit=5, ablate=2, recipes=["all"])
    assert isinstance(found, KVProfile)
    return found


# of the others, whose bytes are not those of their tokens alone, see test_few_bits_api.py
OF_TOKENS = [name for name, row in RECIPES.items() if not chooses_bits(row)]


@pytest.mark.parametrize("recipe", OF_TOKENS)
@pytest.mark.parametrize("budget", [1.0, 0.5, 0.3, 0.1])
def test_plans_keep_within_their_budget(profile: KVProfile, recipe: str, budget: float) -> None:
    plan = api.solve(profile, budget=budget, recipe=recipe)
    assert plan.budget.reached <= budget + 1e-9
    assert plan.budget.reached >= 0.9 * budget
    for length in (100, 401, 1000):
        assert kept_rows(plan, length).sum() <= budget * length * 18 + 1e-6
    if RECIPES[recipe].ranking_heads or RECIPES[recipe].online:
        assert plan.predicted is None, "heads that rank, or shares, are known only later"
    else:
        assert plan.predicted is not None
        assert plan.predicted.kl >= 0
    assert dumps(plan) == dumps(api.solve(profile, budget=budget, recipe=recipe))


@pytest.mark.parametrize("solver", ["milp", "dynamic", "lagrangian"])
def test_solvers_agree_on_the_plan_problem(profile: KVProfile, solver: str) -> None:
    best = api.solve(profile, budget=0.12).certificate
    found = api.solve(profile, budget=0.12, solver=solver).certificate
    assert found.bound is not None
    assert found.gap is not None
    assert found.bound <= best.value * (1 + 1e-6)
    assert best.value * (1 - 1e-4) <= found.value <= best.value * 1.05


def test_planned_value_is_its_prediction(profile: KVProfile) -> None:
    plan = api.solve(profile, budget=0.12)
    assert plan.predicted is not None
    assert plan.certificate.value == pytest.approx(plan.predicted.kl, rel=1e-9)
    assert predict(profile, plan.entries) == plan.predicted.kl


def test_more_budget_never_hurts_the_prediction(profile: KVProfile) -> None:
    values = [api.solve(profile, budget=b).certificate.value for b in (0.05, 0.1, 0.2, 0.4, 0.8)]
    assert values == sorted(values, reverse=True)


def test_planned_beats_published_recipes_on_held_out_prompts(profile: KVProfile) -> None:
    kl = {
        name: api.verify(api.solve(profile, budget=0.1, recipe=name), limit=3).damage.kl
        for name in ("planned", "keydiff", "snapkv", "streaming_llm", "random")
    }
    assert kl["planned"] <= min(kl[name] for name in kl if name != "planned") / 3


@pytest.mark.parametrize("recipe", OF_TOKENS)
def test_verified_bytes_are_the_planned_ones(profile: KVProfile, recipe: str) -> None:
    found = api.verify(api.solve(profile, budget=0.25, recipe=recipe), limit=1)
    assert found.planned_bytes == found.measured_bytes <= 0.25 * found.full_bytes


def test_null_plan_verifies_as_undamaged(profile: KVProfile) -> None:
    found = api.verify(api.solve(profile, budget=1, recipe="snapkv"), limit=2)
    assert found.damage.kl < 1e-8
    assert found.damage.agreement == 1.0
    assert found.damage.recall == found.damage.full_recall


def test_verifying_on_calibration_prompts_is_refused(profile: KVProfile) -> None:
    with pytest.raises(InputError, match="calibrated on"):
        api.verify(
            api.solve(profile, budget=0.5),
            prompts=embedded_prompts("recall", "calibration"),
            limit=5,
        )


@pytest.mark.parametrize(
    ("budget", "error", "sentence"),
    [
        ("0", InputError, "more than 0"),
        ("2", InputError, "at most 1"),
        ("-1", InputError, "not understood"),
        ("nan", InputError, "not understood"),
        ("abc", InputError, "not understood"),
        ("3parsec", InputError, 'unknown unit "parsec"'),
        ("0.001", InfeasibleError, "smallest feasible budget"),
        ("1KiB", InfeasibleError, "smallest feasible budget"),
        ("0tok", InfeasibleError, "smallest feasible budget"),
        ("0.015", InfeasibleError, "smallest feasible"),
    ],
)
def test_bad_budgets(
    profile: KVProfile, budget: str, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        api.solve(profile, budget=budget)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kept", "rows"),
    [
        ("0.2", 0.2, None),
        ("20%", 0.2, None),
        ("3.2bits", 0.2, None),
        ("5x", 0.2, None),
        ("100tok", 0.25, 1800),
        ("900 KiB", 1.0, 7200),
        ("90KiB", 0.1, 720),
        ("1e-1", 0.1, None),
    ],
)
def test_budget_units(profile: KVProfile, text: str, kept: float, rows: int | None) -> None:
    # 400 tokens, 18 heads, 64 numbers of 16 bits a row
    found = parse_budget(text, profile.model, 400)
    assert found.kept == pytest.approx(kept)
    assert found.max_rows == rows


def test_token_budgets_hold_for_longer_prompts(profile: KVProfile) -> None:
    plan = api.solve(profile, budget="64tok", length=400)
    for length in (400, 1000, 1900):
        assert kept_rows(plan, length).sum() <= 64 * 18
    assert kept_rows(plan, 1900).sum() == 64 * 18


def test_score_state_counts_against_the_budget(profile: KVProfile) -> None:
    plan = api.solve(profile, budget=0.5, recipe="h2o")
    (action,) = {entry.action for entry in plan.entries}
    assert isinstance(action, KVAction)
    assert action.keep == pytest.approx(0.5 * 128 / 132)
    assert reached(profile, plan.entries, plan.trigger.decode_every) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "recipe", ["planned", "keydiff", "streaming_llm", "h2o", "tova", "lagkv", "duoattention"]
)
def test_budgets_hold_while_decoding(profile: KVProfile, recipe: str) -> None:
    plan = api.solve(profile, budget=0.3, recipe=recipe, decode_every=8)
    assert plan.trigger.decode_every == 8
    assert plan.budget.reached <= 0.3 + 1e-9
    found = api.generate(plan, max_new_tokens=33)
    assert found.planned_bytes == found.measured_bytes <= 0.3 * found.full_bytes
    verified = api.verify(plan, limit=1)
    assert verified.planned_bytes == verified.measured_bytes


@pytest.mark.parametrize("recipe", ["snapkv", "adakv", "expected_attention", "flashcache"])
def test_recipes_that_cannot_evict_while_decoding_say_so(profile: KVProfile, recipe: str) -> None:
    with pytest.raises(UnsupportedError, match="decode_every"):
        api.solve(profile, budget=0.3, recipe=recipe, decode_every=8)


def test_unknown_names(profile: KVProfile) -> None:
    with pytest.raises(InputError, match='did you mean "snapkv"'):
        api.solve(profile, budget=0.5, recipe="snapvk")
    with pytest.raises(InputError, match="choose one of"):
        api.solve(profile, budget=0.5, solver="oracle")
    with pytest.raises(InputError, match="at least 1"):
        api.solve(profile, budget=0.5, length=-4)


def test_broken_statistics_are_refused(profile: KVProfile) -> None:
    damage = profile.statistics["damage"]
    for bad in (np.nan, -1.0):
        mean = damage.mean.copy()
        mean[0, 0, 0, 0] = bad
        broken = replace(damage, mean=mean)
        with pytest.raises(ProfileError, match='"damage" holds NaN or negative'):
            api.solve(
                replace(profile, statistics={**profile.statistics, "damage": broken}), budget=0.5
            )
    without = {k: v for k, v in profile.statistics.items() if not k.startswith("ablation")}
    with pytest.raises(ProfileError, match="ablation"):
        api.solve(replace(profile, statistics=without), budget=0.5)


def test_plan_of_another_model_is_refused(profile: KVProfile) -> None:
    other = replace(profile, model=replace(profile.model, digest="sha256:" + "1" * 64))
    with pytest.raises(ModelMismatchError):
        api.verify(api.solve(other, budget=0.5), model="recall", limit=1)


def test_knapsack_has_one_option_per_candidate_and_share(profile: KVProfile) -> None:
    recipe = RECIPES["planned"]
    problem = formulate(profile, recipe, parse_budget(0.5, profile.model, 400))
    assert isinstance(problem, Knapsack)
    assert problem.rate.shape == (18, len(recipe.candidates) * len(profile.keeps))
    assert problem.rate.reshape(18, len(recipe.candidates), -1)[:, :, -1] == pytest.approx(1 / 18)
    assert (problem.distortion >= 0).all()


def test_generation_streams_what_it_returns(profile: KVProfile, tmp_path: Path) -> None:
    plan = api.solve(profile, budget=0.3)
    heard: list[str] = []
    found = api.generate(plan, max_new_tokens=5, on_text=heard.append)
    assert "".join(heard) == found.text
    assert found.new_tokens == 5
    assert found.planned_bytes == found.measured_bytes < found.full_bytes
    full = api.generate(api.solve(profile, budget=1, recipe="snapkv"), max_new_tokens=5)
    assert found.text.split()[0] == full.text.split()[0]
    with pytest.raises(InputError, match="the model reads 2048"):
        api.generate(plan, max_new_tokens=3000)
    with pytest.raises(InputError, match="empty"):
        api.generate(plan, prompt="")


def test_statistics_have_named_axes(profile: KVProfile) -> None:
    for name, statistic in profile.statistics.items():
        assert isinstance(statistic, Statistic)
        assert len(statistic.axes) == statistic.mean.ndim, name
        assert statistic.std.shape == statistic.mean.shape
    assert profile.statistics["damage"].count == 5
    assert profile.statistics["ablation_kl"].count == 2
