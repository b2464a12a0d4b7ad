"""Every recipe for diffusion models, from a profile to a plan that makes sense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cacheplan.adapters.denoiser import observe
from cacheplan.adapters.sampling import run_pipeline
from cacheplan.diffusion import solve_features
from cacheplan.errors import CacheplanError, InfeasibleError, InputError, UnsupportedError
from cacheplan.formulate_features import plan_features
from cacheplan.plans.compute import full_flops, planned_flops
from cacheplan.profilers.feature_ablation import whole_site
from cacheplan.profilers.feature_collect import collect_features, feature_sites
from cacheplan.profilers.feature_prompts import digest, picture_prompt
from cacheplan.profilers.settings import FeatureSettings
from cacheplan.profilers.store import ProfileState, finish
from cacheplan.recipes import FEATURE_RECIPES, RECIPES, find_feature_recipe, find_recipe
from cacheplan.runtime.features.apply import apply_features
from cacheplan.runtime.features.program import Program
from cacheplan.schedules.groups import groups
from cacheplan.schedules.keys import problem, published
from cacheplan.schedules.realize import keys_before
from cacheplan.types import FeaturePlan, FeatureProfile, FeatureSite

BUDGETS = (0.7, 0.5, 0.4)
NAMES = tuple(name for name in FEATURE_RECIPES if name != "deepcache")  # of transformers
# the least that 28 steps of 8 blocks can take: warm-up, probing blocks, what is never left out
LEAST = {"dbcache": 0.53, "delta_dit": 0.52, "pab": 0.71}
STEPS = 12


def solve(profile: FeatureProfile, name: str, budget: float) -> FeaturePlan:
    return solve_features(profile, budget=budget, recipe=name, command="")


def computed(plan: FeaturePlan) -> list[int]:
    skipped = {entry.step for entry in plan.entries}
    return [step for step in range(plan.model.steps) if step not in skipped]


def check(plan: FeaturePlan, budget: float) -> None:
    """What a plan must be beyond `plans.check`, which solving has passed."""
    share = planned_flops(plan) / full_flops(plan.model)
    assert plan.budget.reached <= budget + 1e-9
    if plan.gate is None:
        assert share == pytest.approx(plan.budget.reached, rel=1e-9)
    else:
        assert share <= plan.budget.reached + 1e-9  # what the gate is expected to compute besides
    assert (plan.predicted is None) == bool(plan.linears)  # few bits are not predicted
    assert plan.predicted is None or np.isfinite(plan.predicted.error)
    assert plan.certificate.status.endswith(".")
    program = Program(plan)
    for entry in plan.entries:
        if entry.action.basis == "fitted":  # the weights are of the features that the runtime has
            row = np.ones(plan.model.steps, bool)
            row[[e.step for e in plan.entries]] = False
            steps = range(entry.step - 1, -1, -1)
            stored = [s for s in steps if program.computed(entry.site, s)]
            count = len(entry.action.weights)
            assert stored[:count] == keys_before(plan.model, row, entry.step)[:count]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_plans_of_a_smooth_model(synthetic_profiles: Any, name: str, budget: float) -> None:
    profile = synthetic_profiles.build(28, 8)
    if budget < LEAST.get(name, 0):
        with pytest.raises(InfeasibleError, match="smallest feasible budget is"):
            solve(profile, name, budget)
        return
    plan = solve(profile, name, budget)
    check(plan, budget)
    assert plan.entries
    if FEATURE_RECIPES[name].schedule in ("interval", "path", "recurrence", "planned"):
        assert plan.budget.reached > budget - 0.06  # the budget is spent
    assert plan == solve(profile, name, budget)


@pytest.fixture(scope="module")
def real(tiny_pipeline: Any) -> Callable[[str], tuple[Any, Any, FeatureProfile]]:
    known: dict[str, tuple[Any, Any, FeatureProfile]] = {}

    def get(name: str) -> tuple[Any, Any, FeatureProfile]:
        if name not in known:
            pipe, call = tiny_pipeline(name)
            call = {**call, "num_inference_steps": STEPS}
            seen, prompts = observe(pipe, call), [picture_prompt({}, 1)]
            settings = FeatureSettings(
                model=seen.spec,
                sites=feature_sites(seen),
                lags=STEPS - 1,
                tokens=64,
                probes=(whole_site(seen.spec),),
                ablate=1,
                prompts=1,
                prompts_digest=digest(prompts),
                seed=0,
                versions=(),
                linears=seen.linears,
                readers=seen.readers,
            )
            state = ProfileState(settings, range(1))
            collect_features(pipe, seen, call, prompts, state, save=lambda state: None)
            profile = finish(state, "profile")
            assert isinstance(profile, FeatureProfile)
            known[name] = pipe, call, profile
        return known[name]

    return get


@pytest.mark.parametrize("name", ["flux", "wan_experts", "stable_diffusion"])
def test_plans_of_tiny_pipelines(real: Any, name: str) -> None:
    """Solved or refused with a sentence; and the runtime follows what was solved."""
    pipe, call, profile = real(name)
    solved = set()
    for recipe in FEATURE_RECIPES:
        for budget in BUDGETS:
            try:
                plan = solve(profile, recipe, budget)
            except (UnsupportedError, InfeasibleError) as error:
                assert str(error).endswith(".")  # noqa: PT017
                continue
            check(plan, budget)
            solved.add(recipe)
    bits = {"cachequant_w8a8", "cachequant_w4a8"}  # of transformers
    everywhere = {"planned", "uniform", "cachequant", "dpcache", "ertacache", "easycache"}
    parts = {"fora", "taylorseer", "smoothcache"}
    tails = {"magcache", "scm", "fbcache", "dbcache", "bac", "teacache", "delta_dit"}
    own = {"flux": parts | tails | bits, "wan_experts": parts | bits | {"pab"}}
    own["stable_diffusion"] = {"deepcache"}
    assert solved == everywhere | own[name]  # some need more than these budgets
    full = run_pipeline(pipe, call, seed=1).latent
    plan = solve(profile, "planned", 0.6)
    with apply_features(pipe, plan):
        latent = run_pipeline(pipe, call, seed=1).latent
    assert torch.isfinite(latent).all()
    assert 0 < (latent - full).norm() < 0.5 * full.norm()


def test_fora_and_taylorseer_differ_in_warm_up(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(28, 8)
    taylorseer = FEATURE_RECIPES["taylorseer"]
    for kept in BUDGETS:
        masks = []
        for recipe in (FEATURE_RECIPES["fora"], replace(taylorseer, warmup=1)):
            found = groups(profile, recipe)
            masks.append(published(profile, recipe, found, kept)[0])
        np.testing.assert_array_equal(masks[0], masks[1])
        fora, warm = (computed(solve(profile, name, kept)) for name in ("fora", "taylorseer"))
        assert len(fora) == len(warm)
        assert warm[:3] == [0, 1, 2]
        for keys in (fora, warm[2:]):
            assert np.ptp(np.diff([*keys, 28])) <= 1  # evenly spread


@pytest.mark.parametrize("kept", BUDGETS)
def test_even_steps_stop_short_of_the_protected_last_one(
    synthetic_profiles: Any, kept: float
) -> None:
    profile = synthetic_profiles.build(28, 8)
    recipe = replace(FEATURE_RECIPES["fora"], protect_last=True)
    free, ends = (
        np.flatnonzero(published(profile, r, groups(profile, r), kept)[0][0]).tolist()
        for r in (FEATURE_RECIPES["fora"], recipe)
    )
    assert len(ends) == len(free)
    assert ends[-1] == 27
    assert np.ptp(np.diff(ends)) <= 1  # the last stretch is as long as the others


@pytest.mark.parametrize(
    ("ratio", "mask"),
    [
        (1.0, "1111110001000100010001000100"),
        (0.98, "1111110010010010010010010010"),
        (0.97, "1111110101010101010101010101"),
    ],
)
def test_magcache_masks(synthetic_profiles: Any, ratio: float, mask: str) -> None:
    """The published masks for 28 steps and the threshold 0.06, where budgets lead there."""
    ratios = np.where(np.arange(28) > 0, ratio, 1.0)
    profile = synthetic_profiles.build(28, 8, token_ratio=ratios)
    recipe = FEATURE_RECIPES["magcache"]
    found = groups(profile, recipe)
    kept = 1 - found[0].cost * mask.count("0")
    if ratio == 1:  # nothing ever changes, and the recipe has no limit on skips in a row
        assert computed(solve(profile, "magcache", kept)) == list(range(6))
        return
    plan = solve(profile, "magcache", kept)
    assert "".join("01"[step in computed(plan)] for step in range(28)) == mask
    assert plan.budget.reached == pytest.approx(kept)


def test_delta_dit_leaves_out_later_blocks_first(synthetic_profiles: Any) -> None:
    plan = solve(synthetic_profiles.build(20, 6), "delta_dit", 0.7)
    early, late = (
        {e.site for e in plan.entries if (e.step < 10) == first} for first in (True, False)
    )
    assert early == {FeatureSite(part="delta", first=3, last=6)}
    assert late == {FeatureSite(part="delta", first=0, last=3)}
    assert {e.action.do for e in plan.entries} == {"reuse"}
    keys = computed(plan)
    assert np.ptp(np.diff([*keys, 20])) <= 1  # evenly spread


def test_halves_of_experts_and_of_odd_numbers_of_blocks(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(20, 5, starts=(6,))
    found = groups(profile, FEATURE_RECIPES["delta_dit"])
    assert len(found) == 1
    places = [[(s.first, s.last) for s in found[0].at(profile.model, t)] for t in range(20)]
    assert places == [[(3, 5)]] * 6 + [[(8, 10)]] * 4 + [[(5, 7)]] * 10
    check(solve(profile, "delta_dit", 0.8), 0.8)


def test_pab_computes_mlps_and_both_ends(synthetic_profiles: Any) -> None:
    plan = solve(synthetic_profiles.build(20, 4), "pab", 0.75)
    assert {e.site.part for e in plan.entries} == {"attention"}  # the only kind there is
    assert min(e.step for e in plan.entries) == 4  # the first of the middle is computed
    assert max(e.step for e in plan.entries) <= 16
    for block in range(4):
        assert [e.step for e in plan.entries if e.site.first == block] == [
            e.step for e in plan.entries if e.site.first == 0
        ]


def test_cg_taylor_pays_for_the_block_it_probes(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(20, 4)
    plan = solve(profile, "cg_taylor", 0.6)
    skipped = round((1 - plan.budget.reached) / (300 / (20 * 420)))  # three of four blocks
    assert plan.budget.reached == pytest.approx(1 - skipped * 300 / (20 * 420))
    assert plan.gate is not None
    assert plan.gate.threshold > 0
    steps = [entry.step for entry in plan.entries]
    assert steps == list(range(7, 19))  # what the gate may leave out
    assert all(e.action.basis == "taylor" and e.action.order == 1 for e in plan.entries)


def test_deepcache_is_for_unets(real: Any, synthetic_profiles: Any) -> None:
    _, _, profile = real("stable_diffusion")
    deep, uniform = (solve(profile, name, 0.7) for name in ("deepcache", "uniform"))
    assert deep.entries == uniform.entries  # where the whole is the branch
    assert {entry.site.part for entry in deep.entries} == {"branch"}
    with pytest.raises(UnsupportedError, match='"deepcache" caches branch'):
        solve(synthetic_profiles.build(20, 4), "deepcache", 0.5)
    with pytest.raises(UnsupportedError, match="is a UNet"):
        solve(profile, "cg_taylor", 0.7)


@pytest.mark.parametrize(
    ("name", "budget"), [("delta_dit", 0.7), ("pab", 0.9), ("cg_taylor", 0.85), ("teacache", 0.6)]
)
def test_the_runtime_follows(real: Any, name: str, budget: float) -> None:
    pipe, call, profile = real("flux")
    full = run_pipeline(pipe, call, seed=1).latent
    with apply_features(pipe, solve(profile, name, budget)) as report:
        latent = run_pipeline(pipe, call, seed=1).latent
    assert torch.isfinite(latent).all()
    assert 0 < (latent - full).norm() < full.norm()
    assert report.flops < report.full_flops


def test_ertacache_shortens_steps(synthetic_profiles: Any) -> None:
    """As the paper does; the table's row leaves it out."""
    profile = synthetic_profiles.build(8, 2)
    recipe = replace(FEATURE_RECIPES["ertacache"], scale_steps=True)
    plan = plan_features(profile, recipe, 0.6)
    assert len(plan.dt_scale) == 8
    assert plan.dt_scale[-1] == 1
    keys = sorted(set(range(8)) - {entry.step for entry in plan.entries})
    assert keys[-1] == 7
    v = profile.statistics["output_l1"].mean
    covered = 0.0
    for step in range(7):
        rest = (8 - covered) / (8 - step)
        phi = 1.0
        if step not in keys:
            last = max(key for key in keys if key < step)
            phi = float(np.clip(1 - v[step, step - last] / v[step + 1, 1], 0, 1))
        assert plan.dt_scale[step] == pytest.approx(min(rest * phi, 4.0), abs=1e-9)
        covered += rest * phi


def test_problems_count_what_no_skip_saves(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(10, 4)
    recipe = FEATURE_RECIPES["bac"]
    found = problem(profile, recipe, groups(profile, recipe), 0.5)
    assert found.base.sum() == pytest.approx((20 + 4 * 10) / 420)
    assert found.base.sum() + 10 * found.rate.sum() == pytest.approx(1)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "planned"])
def test_budgets_that_are_too_small(synthetic_profiles: Any, name: str) -> None:
    with pytest.raises(InfeasibleError, match="smallest feasible budget is") as error:
        solve(synthetic_profiles.build(20, 4), name, 0.01)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_models_without_the_sites_are_refused(synthetic_profiles: Any, name: str) -> None:
    bare = synthetic_profiles.build(20, 4, only=lambda site: site.part in ("hidden", "model"))
    sites = FEATURE_RECIPES[name].sites
    if sites in ("whole", "model"):
        plan_features(bare, FEATURE_RECIPES[name], 0.7)
        return
    with pytest.raises(UnsupportedError, match=r"caches .* choose a recipe for the whole model"):
        plan_features(bare, FEATURE_RECIPES[name], 0.7)


def test_sites_with_their_own_steps_need_one_denoiser(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(20, 4, starts=(8,))
    with pytest.raises(UnsupportedError, match='"bac" gives every site its own steps'):
        solve(profile, "bac", 0.5)
    for name in ("planned", "fora", "uniform", "smoothcache", "dpcache", "easycache"):
        check(solve(profile, name, 0.7), 0.7)


def test_short_lags(synthetic_profiles: Any) -> None:
    """Nothing is served from farther back than was measured, or the recipe says so."""
    profile = synthetic_profiles.build(20, 4, lags=3)
    for name in NAMES:
        for budget in (0.8, 0.5, 0.2):
            try:
                check(solve(profile, name, budget), budget)
            except CacheplanError as error:
                assert str(error).endswith(".")  # noqa: PT017
                assert "bug" not in str(error)  # noqa: PT017


def test_recipes_are_found_by_name() -> None:
    assert find_feature_recipe("fora").name == "fora"
    assert list(FEATURE_RECIPES) == [row.name for row in FEATURE_RECIPES.values()]
    language = next(name for name in RECIPES if name not in FEATURE_RECIPES)
    with pytest.raises(InputError, match='no recipe "foora": did you mean "fora"'):
        find_feature_recipe("foora")
    with pytest.raises(InputError, match="choose one of planned, uniform, fora"):
        find_feature_recipe("zzz")
    with pytest.raises(InputError, match=f'"{language}" is for language models: choose one of'):
        find_feature_recipe(language)
    with pytest.raises(InputError, match='"fora" is for diffusion models: choose one of'):
        find_recipe("fora")
    assert find_recipe(language).name == language
