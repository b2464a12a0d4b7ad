"""Plans, profiles and recipes of language models in words, and as plain values for `--json`."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cacheplan.cli.bit_words import bit_words
from cacheplan.cli.numbers import number, percent, size
from cacheplan.errors import ProfileError
from cacheplan.types import (
    BestScores,
    Damage,
    FeatureProfile,
    KVAction,
    KVPlan,
    KVProfile,
    KVRecipe,
    LanguageSpec,
    LayerWeight,
    Online,
    Scorer,
)

if TYPE_CHECKING:
    from cacheplan.api import Generation

TAIL = 40  # characters of a prompt that are shown
_MERGED = {"nearest": "nearest", "similar": "best of their run"}


def model_words(spec: LanguageSpec) -> str:
    return f"{spec.id} ({spec.architecture}, {spec.layers} layers of {spec.kv_heads} kv heads)"


def scorer_words(cell: Scorer | LayerWeight) -> str:
    """Name and settings that differ from the default, such as "random (seed 3)"."""
    changed = []
    for field in dataclasses.fields(cell):
        value = getattr(cell, field.name)
        if isinstance(value, tuple) and value:
            changed.append(f"{len(value)} {field.name}")
        elif value != field.default:
            changed.append(field.name if value is True else f"{field.name} {value}")
    return f"{cell.name} ({', '.join(changed)})" if changed else cell.name


def action_words(action: KVAction) -> str:
    """Everything but how much is kept, such as "position, sinks 4"."""
    words = [scorer_words(action.scorer)]
    for name in ("sinks", "recent", "recent_share", "floor"):
        if getattr(action, name):
            words.append(f"{name.replace('_', ' ')} {getattr(action, name)}")
    if action.protect_text:
        words.append("text before images")
    if action.share != "head":
        words.append(f"one set per {action.share}")
    if action.split != "equal":
        words.append(f"{action.split} split")
    if action.merge is not None:
        words.append(f"losers merged into the {_MERGED[action.merge.to]}")
    words += bit_words(action)
    return ", ".join(words)


def division_words(recipe: KVRecipe) -> str:
    """How the budget is divided, such as "proportional to pyramid"."""
    words = recipe.allocation
    if recipe.weight is not None:
        words += f" to {scorer_words(recipe.weight)}"
    if recipe.least or recipe.least_share:
        words += f", at least {recipe.least or f'{recipe.least_share:g} of the mean'}"
    if math.isfinite(recipe.most):
        words += f", at most {recipe.most:g} times the mean"
    return words


def cells(recipe: KVRecipe) -> str:
    """What a recipe is made of, in one line."""
    words = [division_words(recipe)]
    if len(recipe.candidates) == 1:
        words.append(action_words(recipe.candidates[0]))
    else:
        names = dict.fromkeys(candidate.scorer.name for candidate in recipe.candidates)
        words.append(f"{len(recipe.candidates)} candidates: {', '.join(names)}")
    if recipe.formats:
        words.append(f"{len(recipe.formats)} precisions")
    if recipe.demotions:
        words.append(f"{len(recipe.demotions)} pairs of them where losers are demoted")
    if recipe.ranking_heads:
        words.append(f"chosen by {recipe.ranking_heads} retrieval heads")
    if recipe.decode_every is not None:
        words.append(f"again every {recipe.decode_every} new tokens")
    if recipe.prefill_chunk is not None:
        words.append(f"prompts in pieces of {recipe.prefill_chunk} tokens")
    if recipe.online is not None:
        words.append(_online_words(recipe.online))
    return "; ".join(words)


def statistic(profile: KVProfile | FeatureProfile, name: str) -> NDArray[np.float64]:
    """The mean over prompts."""
    if name not in profile.statistics:
        raise ProfileError(f'The profile has no statistic "{name}": run `cacheplan profile` again.')
    return profile.statistics[name].mean


def profile_words(profile: KVProfile) -> str:
    context = statistic(profile, "context_length")
    continuation = statistic(profile, "continuation_length")
    return (
        f"{model_words(profile.model)}, {profile.prompts} prompts of {context:.0f} + "
        f"{continuation:.0f} tokens"
    )


def image_words(profile: KVProfile) -> str | None:
    """What images take of context and attention; None for profiles without any."""
    if "image_mass" not in profile.statistics:
        return None
    share, mass = statistic(profile, "image_share"), statistic(profile, "image_mass")
    layers = ", ".join(f"{100 * layer:.0f}" for layer in mass)
    return (
        f"images are {percent(float(share))} of the context and receive this much of the attention "
        f"to it, in percent by layer: {layers}"
    )


def profile_facts(profile: KVProfile) -> dict[str, Any]:
    """What a profile of this family holds besides what all do."""
    return {
        "keeps": list(profile.keeps),
        "candidates": [action_words(candidate) for candidate in profile.candidates],
        **{
            name: profile.statistics[name].mean.tolist()
            for name in ("image_share", "image_mass")
            if name in profile.statistics
        },
    }


def plan_words(plan: KVPlan) -> list[str]:
    """Budget, damage and certificate, a line each."""
    budget, certificate = plan.budget, plan.certificate
    lines = [
        f"budget     {budget.asked}: keeps {percent(budget.reached)} of the cache"
        f" of {budget.length} tokens",
        f"predicted  KL {number(plan.predicted.kl if plan.predicted else None)}",
        f"measured   {damage_words(plan.measured)}",
        f"certified  {certificate.solver}: {certificate.status}",
    ]
    if budget.max_rows is not None:
        lines[0] += f", never more than {budget.max_rows} rows"
    if plan.trigger.decode_every is not None:
        lines.append(f"decoding   cut back every {plan.trigger.decode_every} new tokens")
    if plan.trigger.prefill_chunk is not None:
        lines.append(f"prompts    read in pieces of {plan.trigger.prefill_chunk} tokens")
    if plan.trigger.online is not None:
        lines.append(f"division   {_online_words(plan.trigger.online)}")
    return lines


def _online_words(online: Online) -> str:
    if isinstance(online, BestScores):
        return "for each prompt, the best scores of all layers and heads stay"
    return "layers divided anew for each prompt"


def damage_words(damage: Damage | None) -> str:
    if damage is None:
        return "not yet"
    words = [f"KL {number(damage.kl)} on {damage.prompts} prompts"]
    if damage.agreement is not None:
        words.append(f"{percent(damage.agreement)} same top token")
    if damage.recall is not None and damage.full_recall is not None:
        words.append(f"recall {100 * damage.recall:.1f} of {percent(damage.full_recall)}")
    return ", ".join(words)


def tail(text: str) -> str:
    """The last words of a text."""
    if len(text) <= TAIL:
        return text
    return "... " + text[-TAIL:].partition(" ")[2]


def generation_words(found: Generation) -> str:
    """Speed, bytes and attention path in one line; the first token belongs to the prompt's time."""
    words = f"{found.prompt_tokens} + {found.new_tokens} tokens"
    if found.new_tokens > 1 and found.decode_seconds > 0:
        words += f", {(found.new_tokens - 1) / found.decode_seconds:.1f} tokens/s"
    return (
        f"{words}; cache {size(found.planned_bytes)} planned, {size(found.measured_bytes)} "
        f"measured, {percent(found.measured_bytes / found.full_bytes)} of full; "
        f"attention: {found.path}"
    )
