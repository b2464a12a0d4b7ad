"""Plans, profiles and recipes of language models in words, and as plain values for `--json`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cacheplan.cli.numbers import number, percent, size
from cacheplan.errors import ProfileError
from cacheplan.types import (
    Damage,
    FeatureProfile,
    KVAction,
    KVPlan,
    KVProfile,
    KVRecipe,
    LanguageSpec,
    Scorer,
)

if TYPE_CHECKING:
    from cacheplan.api import Generation

TAIL = 40  # characters of a prompt that are shown


def model_words(spec: LanguageSpec) -> str:
    return f"{spec.id} ({spec.architecture}, {spec.layers} layers of {spec.kv_heads} kv heads)"


def scorer_words(scorer: Scorer) -> str:
    """Name and settings that differ from the default, such as "random (seed 3)"."""
    changed = [
        field.name if value is True else f"{field.name} {value}"
        for field in dataclasses.fields(scorer)
        if (value := getattr(scorer, field.name)) != field.default
    ]
    return f"{scorer.name} ({', '.join(changed)})" if changed else scorer.name


def action_words(action: KVAction) -> str:
    """Everything but how much is kept, such as "position, sinks 4"."""
    words = [scorer_words(action.scorer)]
    for name in ("sinks", "recent", "recent_share", "floor"):
        if getattr(action, name):
            words.append(f"{name.replace('_', ' ')} {getattr(action, name)}")
    if action.share != "head":
        words.append(f"one set per {action.share}")
    if action.split != "equal":
        words.append(f"{action.split} split")
    return ", ".join(words)


def cells(recipe: KVRecipe) -> str:
    """What a recipe is made of, in one line."""
    if len(recipe.candidates) == 1:
        words = [recipe.allocation, action_words(recipe.candidates[0])]
    else:
        names = dict.fromkeys(candidate.scorer.name for candidate in recipe.candidates)
        words = [recipe.allocation, f"{len(recipe.candidates)} candidates: {', '.join(names)}"]
    if recipe.decode_every is not None:
        words.append(f"again every {recipe.decode_every} new tokens")
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


def profile_facts(profile: KVProfile) -> dict[str, Any]:
    """What a profile of this family holds besides what all do."""
    return {
        "keeps": list(profile.keeps),
        "candidates": [action_words(candidate) for candidate in profile.candidates],
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
    return lines


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
