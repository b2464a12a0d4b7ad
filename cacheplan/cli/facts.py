"""Plans, profiles and recipes in words for people and as plain values for `--json`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacheplan.errors import ProfileError
from cacheplan.plans.codec import encode
from cacheplan.types import Damage, KVAction, KVPlan, KVProfile, KVRecipe, LanguageSpec, Scorer

ABSENT = "-"


def percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f} %"


def number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3g}"


def size(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least one before the point."""
    value, units = float(count), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while value >= 1024 and unit != "TiB":
        value, unit = value / 1024, next(units)
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


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


def statistic(profile: KVProfile, name: str) -> NDArray[np.float64]:
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
    return {
        "family": profile.model.family,
        "model": encode(LanguageSpec, profile.model),
        "digest": profile.digest,
        "prompts": profile.prompts,
        "prompts_digest": profile.prompts_digest,
        "seed": profile.seed,
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


def plan_facts(plan: KVPlan) -> dict[str, Any]:
    """The plan without its entries, as in the file."""
    facts: dict[str, Any] = encode(KVPlan, plan)
    del facts["entries"]
    return facts


def damage_facts(damage: Damage | None) -> dict[str, Any] | None:
    return None if damage is None else dataclasses.asdict(damage)
