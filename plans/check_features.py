"""Feature plans: whether they make sense, whether they can be run, and what their model is."""

from __future__ import annotations

import json
from itertools import groupby, pairwise

from cacheplan.errors import PlanError
from cacheplan.plans.compute import text_parts
from cacheplan.plans.rules import (
    BASES,
    NATURAL,
    PARTS,
    POSITIVE,
    RANGES,
    SIGNALS,
    check_budget,
    check_certificate,
    need,
    refuse,
)
from cacheplan.plans.rules_features import (
    check_action,
    check_diffusion,
    check_gate,
    check_site,
    finite,
)
from cacheplan.plans.rules_linears import check_linears, check_runnable_linears
from cacheplan.plans.words import site_words
from cacheplan.types import DiffusionSpec, FeatureDamage, FeatureEntry, FeaturePlan

ORDER = "expected each site once, sorted by step, first, last and part"


def check_features(plan: FeaturePlan) -> None:
    """Every rule a feature plan must obey on its own; PlanError for the first one broken."""
    model, budget = plan.model, plan.budget
    check_diffusion(model)
    check_budget(budget)
    for name, value in (("length", budget.length), ("max_rows", budget.max_rows)):
        need(value is None, f"budget.{name}", value, "none in a plan for features")
    for index, entry in enumerate(plan.entries):
        _check_entry(entry, model, f"entries[{index}]")
    for index, (before, after) in enumerate(pairwise(plan.entries), start=1):
        if _order(before) >= _order(after):
            raise PlanError(f"entries[{index}] is {_words(after)} after {_words(before)}, {ORDER}")
    _check_nesting(plan.entries)
    if plan.gate is not None:
        check_gate(plan.gate, len(model.blocks))
    scales = len(plan.dt_scale)
    need(scales in (0, model.steps), "dt_scale", plan.dt_scale, f"none or {model.steps} numbers")
    for index, scale in enumerate(plan.dt_scale):
        need(0 <= scale <= 4, f"dt_scale[{index}]", scale, "a number from 0 to 4")
    known = bool(text_parts(model.blocks))
    need(known or not plan.text_once, "text_once", True, "false where no part has a `text`")
    check_linears(plan)
    check_certificate(plan.certificate)
    for name, damage in (("predicted", plan.predicted), ("measured", plan.measured)):
        if damage is not None:
            _check_damage(damage, name)


def check_runnable_features(plan: FeaturePlan) -> None:
    """UnsupportedError, with what is supported instead, if the runtime cannot follow the plan."""
    for index, entry in enumerate(plan.entries):
        at = f"entries[{index}]"
        if entry.site.part not in PARTS:
            refuse(f"{at}.site.part", entry.site.part, f"one of {', '.join(PARTS)}")
        if entry.action.basis not in BASES:
            refuse(f"{at}.action.basis", entry.action.basis, f"one of {', '.join(BASES)}")
    check_runnable_linears(plan)
    if plan.gate is not None and plan.gate.signal not in SIGNALS:
        refuse("gate.signal", plan.gate.signal, f"one of {', '.join(SIGNALS)}")


def identity_features(spec: DiffusionSpec) -> dict[str, object]:
    """What decides whether two pipelines share plans, in the order in which to report it."""
    return {
        "pipeline": spec.pipeline,
        "architecture": spec.architecture,
        "number of steps": spec.steps,
        **_settings("scheduler", spec.scheduler),
        **{f"noise level {index}": sigma for index, sigma in enumerate(spec.sigmas)},
        **_settings("call", spec.call),
        "list of branches": ", ".join(spec.branches),
        "change of denoiser": ", ".join(map(str, spec.expert_starts)) or "none",
        "shape of the latent": " x ".join(map(str, spec.latent)),
        "number of blocks": len(spec.blocks),
        **{
            f"block {index}": " ".join([block.path, *(f"{p.name}:{p.path}" for p in block.parts)])
            for index, block in enumerate(spec.blocks)
        },
        "digest of configuration and weights": spec.digest,
    }


def _settings(name: str, text: str) -> dict[str, object]:
    """Each setting of a JSON object by its own name, so that the one that differs is told."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return {name: text}
    return {f"{name} setting {key}": json.dumps(value) for key, value in found.items()}


def _check_entry(entry: FeatureEntry, model: DiffusionSpec, path: str) -> None:
    check_site(entry.site, model, f"{path}.site")
    inside = 0 <= entry.step < model.steps
    need(inside, f"{path}.step", entry.step, f"an integer from 0 below {model.steps}")
    fresh = entry.step == 0 or entry.step in model.expert_starts
    need(not fresh, f"{path}.step", entry.step, "a step that is not the first of its denoiser")
    check_action(entry.action, entry.site, f"{path}.action")


def _check_nesting(entries: tuple[FeatureEntry, ...]) -> None:
    """PlanError if two features of one step hold the same block, unless both are parts of it.

    Entries are sorted, so it is enough to know which of those before ends last.
    """
    for _, step in groupby(enumerate(entries), key=lambda item: item[1].step):
        any_last: FeatureEntry | None = None
        wide_last: FeatureEntry | None = None
        for index, entry in step:
            wide = entry.site.part in RANGES
            other = any_last if wide else wide_last
            if other is not None and entry.site.first < other.site.last:
                raise PlanError(
                    f"entries[{index}] is {_words(entry)}, which has blocks in common with "
                    f"{_words(other)}, expected only one of them"
                )
            if any_last is None or entry.site.last > any_last.site.last:
                any_last = entry
            if wide:
                wide_last = entry


def _check_damage(damage: FeatureDamage, path: str) -> None:
    need(finite(damage.error) and damage.error >= 0, f"{path}.error", damage.error, POSITIVE)
    psnr, ssim, lpips = damage.psnr, damage.ssim, damage.lpips
    need(psnr is None or finite(psnr), f"{path}.psnr", psnr, "a finite number")
    need(ssim is None or -1 <= ssim <= 1, f"{path}.ssim", ssim, "a number from -1 to 1")
    need(lpips is None or (finite(lpips) and lpips >= 0), f"{path}.lpips", lpips, POSITIVE)
    need(damage.prompts >= 0, f"{path}.prompts", damage.prompts, NATURAL)


def _order(entry: FeatureEntry) -> tuple[int, int, int, str]:
    return entry.step, entry.site.first, entry.site.last, entry.site.part


def _words(entry: FeatureEntry) -> str:
    return f"{site_words(entry.site)} at step {entry.step}"
