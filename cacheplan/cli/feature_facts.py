"""Plans, profiles and recipes of diffusion models in words, and as plain values for `--json`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cacheplan.cli.numbers import count, number, percent, size
from cacheplan.plans.compute import full_flops, planned_memory
from cacheplan.plans.words import plural, simulation_words, site_words
from cacheplan.types import (
    DiffusionSpec,
    FeatureDamage,
    FeaturePlan,
    FeatureProfile,
    FeatureRecipe,
    Gate,
)

if TYPE_CHECKING:
    from cacheplan.api import Drawing


def model_words(spec: DiffusionSpec) -> str:
    guidance = json.loads(spec.call).get("guidance_scale")
    words = f"{spec.id} ({spec.architecture}, {len(spec.blocks)} blocks, {spec.steps} steps"
    return words + (")" if guidance is None else f", guidance {guidance:g})")


def profile_words(profile: FeatureProfile) -> str:
    return (
        f"{model_words(profile.model)}, {profile.prompts} prompts, {len(profile.sites)} features "
        f"compared up to {profile.lags} steps back"
    )


def profile_facts(profile: FeatureProfile) -> dict[str, Any]:
    """What a profile of this family holds besides what all do."""
    return {
        "lags": profile.lags,
        "sites": [site_words(site) for site in profile.sites],
        "probes": [site_words(site) for site in profile.probes],
    }


def plan_words(plan: FeaturePlan) -> list[str]:
    """Budget, damage and certificate, a line each."""
    budget, certificate, spec = plan.budget, plan.certificate, plan.model
    error = plan.predicted.error if plan.predicted else None
    lines = [
        f"budget     {budget.asked}: computes {percent(budget.reached)} of "
        f"{count(full_flops(spec))}FLOPs, keeps {size(planned_memory(plan, 4))} in float32",
        f"predicted  error {number(error)} of the final latent",
        f"measured   {damage_words(plan.measured)}",
        f"certified  {certificate.solver}: {certificate.status}",
    ]
    if plan.gate is not None:
        lines.append(f"gate       {gate_words(plan.gate)}")
    if plan.text_once:
        lines.append("text       its keys and values computed once per run, which changes nothing")
    if words := simulation_words(plan):
        lines.append(f"few bits   {words}")
    if plan.dt_scale:
        lines.append(
            f"steps      scaled by {number(min(plan.dt_scale))} to {number(max(plan.dt_scale))}"
        )
    return lines


def gate_words(gate: Gate) -> str:
    words = [f"computes where the signal {gate.signal} exceeds {number(gate.threshold)}"]
    if gate.accumulate != "none":
        words.append(f"accumulated ({gate.accumulate})")
    if gate.max_consecutive is not None:
        words.append(f"at most {gate.max_consecutive} skips in a row")
    return ", ".join(words)


def damage_words(damage: FeatureDamage | None) -> str:
    if damage is None:
        return "not yet"
    words = [f"error {number(damage.error)} on {damage.prompts} prompts"]
    if damage.psnr is not None:
        words.append(f"PSNR {damage.psnr:.1f} dB")
    if damage.ssim is not None:
        words.append(f"SSIM {damage.ssim:.3f}")
    if damage.lpips is not None:
        words.append(f"LPIPS {number(damage.lpips)}")
    return ", ".join(words)


def cells(recipe: FeatureRecipe) -> str:
    """What a recipe is made of, in one line."""
    words = [f"{recipe.schedule} over {recipe.sites}"]
    if recipe.share != "all":
        words.append(f"by {recipe.share}")
    if recipe.basis != "hold":
        words.append(f"{recipe.basis} forecast of order {recipe.order}")
    if recipe.correction != "none":
        words.append(f"{recipe.correction} correction")
    if recipe.gate is not None:
        words.append(f"gate {recipe.gate.signal}")
    if recipe.bits is not None:
        words.append("weights in {} bits, activations in {}, simulated".format(*recipe.bits))
    if recipe.scale_steps:
        words.append("steps scaled")
    if recipe.text_once:
        words.append("text once")
    return "; ".join(words)


def drawing_words(found: Drawing) -> str:
    """What a picture took, in one line."""
    words = (
        f'"{found.prompt}", seed {found.seed}: {found.steps} steps in {found.seconds:.2f} s; '
        f"compute {percent(found.planned_share)} planned, {percent(found.done_share)} done"
    )
    if found.promoted:
        words += f" (the gate computed {plural('step', list(found.promoted))})"
    return (
        f"{words}; features {size(found.planned_bytes)} planned, {size(found.measured_bytes)} "
        f"measured; forecast: {found.path}"
    )
