"""Plans for diffusion features that lack one part of the planner each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacheplan import api
from cacheplan.errors import InfeasibleError, UnsupportedError
from cacheplan.formulate_features import Planned, plan_features, plan_for
from cacheplan.recipes import FEATURE_RECIPES
from cacheplan.schedules.groups import groups, whole
from cacheplan.schedules.keys import forced_steps, published
from cacheplan.schedules.planned import plan_steps, tails
from cacheplan.types import FeaturePlan, FeatureProfile, FeatureRecipe

Mask = NDArray[np.bool_]
PLANNED = FEATURE_RECIPES["planned"]
PLAIN = replace(PLANNED, text_once=False)  # so that all rows count the same at a computed step
# what rows are compared with
OURS, TEXT, STEPS = "planned", "planned, the text read once", "whole steps alone"
EVALUATIONS, REFINED_ON = 40, 8  # of the closed loop
# how a step is served from the computed ones; the planner fits two of them by least squares
SERVED = {
    "reuse": {"basis": "hold", "order": 0},
    "Taylor series of two keys": {"basis": "taylor", "order": 1},
    "least squares of one key": {"basis": "hold", "order": 0, "correction": "scalar"},
    "least squares of one key's channels": {"basis": "hold", "order": 0, "correction": "channel"},
}
# schedules of features of one kind, reused, by their own error
SITES = {
    "the last hidden state, one schedule": ("whole", "all"),
    "blocks, one schedule": ("blocks", "all"),
    "blocks, a schedule for each": ("blocks", "site"),
    "attention and mlp, one schedule": ("parts", "all"),
    "attention and mlp, a schedule for each kind": ("parts", "type"),
    "attention and mlp, a schedule for each": ("parts", "site"),
}


@dataclass(frozen=True)
class Variant:
    """A plan without one part; `whole` is the plan that has it."""

    axis: str
    name: str
    whole: str
    plan: FeaturePlan


def variants(
    profile: FeatureProfile,
    budget: float,
    model: str | None,
    calibration: Path | None,
    settings: dict[str, Any],
) -> Iterator[Variant]:
    """All plans of one budget; raises InfeasibleError where even the whole planner finds none."""
    whole_plan = api.solve(profile, budget=budget)
    kept = whole_plan.budget.kept
    ours = _with(whole_plan, plan_features(profile, PLAIN, kept))
    yield Variant("", OURS, OURS, ours)
    if whole_plan.text_once:
        yield Variant("text", TEXT, OURS, whole_plan)
    stepwise = whole_steps(profile)
    yield Variant("granularity", STEPS, OURS, _with(ours, plan_features(stepwise, PLAIN, kept)))
    forced = forced_steps(profile, PLAIN)
    mask = plan_steps(stepwise, forced, kept).computed[None]
    for name, cells in SERVED.items():
        row = replace(PLAIN, name=name, schedule="path", **cells)  # type: ignore[arg-type]
        found = plan_for(profile, row, mask, kept)
        if found is not None:
            yield Variant("forecast, at the same steps", name, STEPS, _with(ours, found))
    even, _, _ = published(profile, _rows("uniform"), groups(profile, _rows("uniform")), kept)
    for name, steps in {
        "evenly spread": even[0],
        "shortest path, without sensitivities": plan_steps(
            insensitive(stepwise), forced, kept
        ).computed,
    }.items():
        found = plan_for(stepwise, PLAIN, steps[None], kept)
        if found is not None:
            yield Variant("steps, forecast as planned", name, STEPS, _with(ours, found))
    for name, (sites, share) in SITES.items():
        row = FeatureRecipe(
            name=name, summary="", paper="", sites=sites, share=share, schedule="path"
        )
        try:
            found = plan_features(profile, row, kept)
        except (InfeasibleError, UnsupportedError):
            continue
        reference = next(iter(SITES))
        yield Variant("granularity of reuse", name, reference, _with(ours, found))
    refined = api.refine(
        whole_plan,
        profile,
        model=model,
        prompts=calibration,
        settings=settings,
        evaluations=EVALUATIONS,
        limit=REFINED_ON,
    )
    start = TEXT if whole_plan.text_once else OURS
    yield Variant("loop", "closed: refined on calibration prompts", start, refined)


def _rows(name: str) -> FeatureRecipe:
    return FEATURE_RECIPES[name]


def _with(plan: FeaturePlan, found: Planned) -> FeaturePlan:
    return replace(
        plan,
        entries=found.entries,
        text_once=found.text_once,
        gate=found.gate,
        dt_scale=found.dt_scale,
        certificate=found.certificate,
        budget=replace(plan.budget, reached=found.reached),
        predicted=None,
    )


def whole_steps(profile: FeatureProfile) -> FeatureProfile:
    """The profile of a model whose steps are computed whole or not at all."""
    gone = set(tails(profile)) - {whole(profile)}
    kept = [index for index, site in enumerate(profile.sites) if site not in gone]
    statistics = {
        name: replace(
            found,
            mean=np.take(found.mean, kept, axis=found.axes.index("site")),
            std=np.take(found.std, kept, axis=found.axes.index("site")),
        )
        if "site" in found.axes
        else found
        for name, found in profile.statistics.items()
    }
    return replace(
        profile, statistics=statistics, sites=tuple(profile.sites[index] for index in kept)
    )


def insensitive(profile: FeatureProfile) -> FeatureProfile:
    """The profile of a model whose final latent is as far off as a step, whichever it is."""
    same = profile.statistics["final_error"]
    changed = {"final_damage": same, "output_damage": same}
    return replace(profile, statistics={**profile.statistics, **changed})
