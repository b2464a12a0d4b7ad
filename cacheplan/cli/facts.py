"""Plans, profiles and damage in words for people and as plain values for `--json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from cacheplan.cli import feature_facts, kv_facts
from cacheplan.plans.codec import encode
from cacheplan.types import (
    Damage,
    FeatureDamage,
    FeaturePlan,
    KVPlan,
    KVProfile,
    LanguageSpec,
    ModelSpec,
    Plan,
    Profile,
)


def model_words(spec: ModelSpec) -> str:
    if isinstance(spec, LanguageSpec):
        return kv_facts.model_words(spec)
    return feature_facts.model_words(spec)


def profile_words(profile: Profile) -> str:
    if isinstance(profile, KVProfile):
        return kv_facts.profile_words(profile)
    return feature_facts.profile_words(profile)


def profile_facts(profile: Profile) -> dict[str, Any]:
    own = (
        kv_facts.profile_facts(profile)
        if isinstance(profile, KVProfile)
        else feature_facts.profile_facts(profile)
    )
    return {
        "family": profile.model.family,
        "model": encode(type(profile.model), profile.model),
        "digest": profile.digest,
        "prompts": profile.prompts,
        "prompts_digest": profile.prompts_digest,
        "seed": profile.seed,
        **own,
    }


def plan_words(plan: Plan) -> list[str]:
    """Budget, damage and certificate, a line each."""
    if isinstance(plan, KVPlan):
        return kv_facts.plan_words(plan)
    assert isinstance(plan, FeaturePlan)
    return feature_facts.plan_words(plan)


def plan_facts(plan: Plan) -> dict[str, Any]:
    """The plan without its entries, as in the file."""
    facts: dict[str, Any] = encode(type(plan), plan)
    del facts["entries"]
    return facts


def damage_facts(damage: Damage | FeatureDamage | None) -> dict[str, Any] | None:
    return None if damage is None else dataclasses.asdict(damage)
