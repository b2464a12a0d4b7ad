"""What the commands do for diffusion models: profile, solve and verify plans for features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheplan.environment import installed_versions
from cacheplan.errors import InputError, UnsupportedError
from cacheplan.inputs import refuse_calibration
from cacheplan.picture_inputs import open_for_plan, open_pipeline, picture_prompts_for
from cacheplan.plans.check import check, check_model, check_runnable
from cacheplan.types import FeatureDamage, FeaturePlan, FeatureProfile, Provenance

if TYPE_CHECKING:
    from cacheplan.picture_verification import PictureVerification, Row
    from cacheplan.processes import Processes
    from cacheplan.profilers.collect import Progress

ABLATE, LAGS, TOKENS = 4, 16, 512
EVALUATIONS, REFINING = 200, 8  # schedules that are run, on how many prompts each


def profile_features(
    model: str | None,
    *,
    out: Path,
    prompts: Path | None,
    settings: Mapping[str, Any],
    limit: int | None,
    ablate: int | None,
    gradients: int | None,
    lags: int | None,
    tokens: int | None,
    seed: int,
    shard: tuple[int, int],
    device: str | None,
    dtype: str | None,
    progress: Progress | None,
    processes: Processes,
) -> FeatureProfile | None:
    """Measure a diffusion pipeline and write its profile; see `cacheplan.api.profile`."""
    import torch

    from cacheplan.adapters.denoiser import check_worth, observe
    from cacheplan.measuring import check_division, measure
    from cacheplan.profilers.feature_ablation import whole_site
    from cacheplan.profilers.feature_collect import collect_features, feature_sites
    from cacheplan.profilers.feature_gradients import check_gradients
    from cacheplan.profilers.feature_prompts import digest
    from cacheplan.profilers.settings import FeatureSettings

    ablated = ABLATE if ablate is None else ablate
    check_division(shard, ablated, processes)
    opened = open_pipeline(model, settings, device=device, dtype=dtype)
    texts = picture_prompts_for(opened, prompts, "calibration", limit)
    torch.manual_seed(seed)
    seen = observe(opened.pipe, {**opened.call, **texts[0].call}, opened.name)
    spec = seen.spec
    check_worth(spec)
    if gradients:
        check_gradients(seen)
    kept = FeatureSettings(
        model=spec,
        sites=feature_sites(seen),
        lags=_lags(lags, spec.steps),
        tokens=_at_least("--tokens", TOKENS if tokens is None else tokens, "token"),
        probes=(whole_site(spec),),
        ablate=min(ablated, len(texts)),
        gradients=min(_at_least("--gradients", gradients or 0, "prompt", least=0), len(texts)),
        prompts=len(texts),
        prompts_digest=digest(texts),
        seed=seed,
        versions=installed_versions("diffusers"),
        linears=seen.linears,
        readers=seen.readers,
    )
    found = measure(
        kept,
        shard,
        out,
        lambda state, save, report: collect_features(
            opened.pipe, seen, opened.call, texts, state, save=save, progress=report
        ),
        processes=processes,
        progress=progress,
    )
    assert found is None or isinstance(found, FeatureProfile)
    return found


def _lags(asked: int | None, steps: int) -> int:
    if asked is not None and asked >= steps:
        raise InputError(
            f"--lags is {asked}, but in a run of {steps} steps features can be compared with those "
            f"of at most {steps - 1} steps before."
        )
    return min(steps - 1, LAGS) if asked is None else _at_least("--lags", asked, "step")


def _at_least(option: str, value: int, unit: str, least: int = 1) -> int:
    if value < least:
        units = unit if least == 1 else f"{unit}s"
        raise InputError(f"{option} is {value}, expected at least {least} {units}.")
    return value


def solve_features(
    profile: FeatureProfile, *, budget: str | float, recipe: str, command: str
) -> FeaturePlan:
    """Choose what every step computes under the budget; see `cacheplan.api.solve`."""
    from cacheplan.budget import parse_compute_budget
    from cacheplan.formulate_features import plan_features
    from cacheplan.recipes import find_feature_recipe

    row = find_feature_recipe(recipe)
    asked = parse_compute_budget(budget)
    found = plan_features(profile, row, asked.kept)
    predicted = FeatureDamage(
        error=found.predicted_error, prompts=profile.prompts, digest=profile.prompts_digest
    )
    plan = FeaturePlan(
        model=profile.model,
        recipe=row.name,
        budget=replace(asked, reached=found.reached),
        entries=found.entries,
        gate=found.gate,
        dt_scale=found.dt_scale,
        text_once=found.text_once,
        linears=found.linears,
        certificate=found.certificate,
        predicted=None if found.linears else predicted,  # the profile says nothing of few bits
        measured=None,
        provenance=Provenance(
            profile=profile.digest,
            prompts=profile.prompts_digest,
            seed=profile.seed,
            versions=installed_versions("diffusers"),
            command=command,
        ),
    )
    check(plan)
    check_runnable(plan)
    return plan


def verify_features(
    plans: Sequence[FeaturePlan],
    *,
    model: str | None,
    prompts: Path | None,
    settings: Mapping[str, Any],
    limit: int | None,
    device: str | None,
    dtype: str | None,
    progress: Progress | None,
) -> tuple[list[PictureVerification], list[Row]]:
    """Measure plans of one pipeline on held-out prompts; see `cacheplan.api.verify`.

    Returns a measurement per plan and the pictures of every prompt.
    """
    from cacheplan.picture_verification import measure_plans
    from cacheplan.profilers.feature_prompts import digest

    first = plans[0]
    for plan in plans[1:]:
        check_model(first, plan.model)
    opened = open_for_plan(first, model=model, settings=settings, device=device, dtype=dtype)
    texts = picture_prompts_for(opened, prompts, "heldout", limit)
    for plan in plans:
        refuse_calibration(digest(texts), plan.provenance)
    return measure_plans(opened.pipe, plans, opened.call, texts, progress=progress)


def refine_features(
    plan: FeaturePlan,
    profile: FeatureProfile,
    *,
    model: str | None,
    prompts: Path | None,
    settings: Mapping[str, Any],
    limit: int | None,
    evaluations: int | None,
    minutes: float | None,
    state: Path | None,
    device: str | None,
    dtype: str | None,
    command: str,
    progress: Progress | None,
) -> FeaturePlan:
    """Improve a plan by measuring its neighbours; see `cacheplan.api.refine`."""
    from cacheplan.picture_refinement import refine_plan
    from cacheplan.profilers.feature_prompts import digest
    from cacheplan.recipes import find_feature_recipe

    most = _at_least("--evaluations", EVALUATIONS if evaluations is None else evaluations, "run")
    few = _at_least("--limit", REFINING if limit is None else limit, "prompt")
    if minutes is not None and not minutes > 0:
        raise InputError(f"--minutes is {minutes:g}, expected more than 0.")
    if plan.gate is not None:
        raise UnsupportedError(
            f'The plan\'s gate "{plan.gate.signal}" chooses steps while it runs, so there are none '
            "to move: refine a plan of a recipe without a gate."
        )
    if plan.provenance.profile != profile.digest:
        raise InputError(
            "The plan was not solved from this profile: give the file that `cacheplan solve` read."
        )
    opened = open_for_plan(plan, model=model, settings=settings, device=device, dtype=dtype)
    texts = picture_prompts_for(opened, prompts, "calibration", profile.prompts)
    if digest(texts) != profile.prompts_digest:
        raise InputError(
            "These are not the prompts of the profile: refine on those that `cacheplan profile` "
            "was given, so that no others are used up for verification."
        )
    refined = refine_plan(
        opened.pipe,
        plan,
        profile,
        find_feature_recipe(plan.recipe),
        opened.call,
        texts[:few],
        state=state,
        evaluations=most,
        minutes=minutes,
        progress=progress,
    )
    versions = installed_versions("diffusers")
    origin = replace(plan.provenance, versions=versions, command=command)
    return replace(refined, provenance=origin)
