"""What changed between two plans, in lines for people."""

from __future__ import annotations

from cacheplan.plans import diff_features, diff_kv
from cacheplan.plans.words import changes
from cacheplan.types import FeaturePlan, KVPlan, Plan

KV = ("model", "recipe", "budget", "trigger", "predicted", "measured", "certificate")
FEATURES = (
    *("model", "recipe", "budget", "gate", "dt_scale", "text_once"),
    *("predicted", "measured", "certificate"),
)


def diff(a: Plan, b: Plan) -> list[str]:
    """One line per change from `a` to `b`, provenance aside; plans of two families share none."""
    if isinstance(a, KVPlan) and isinstance(b, KVPlan):
        return _parts(a, b, KV) + diff_kv.site_lines(a, b)
    if isinstance(a, FeaturePlan) and isinstance(b, FeaturePlan):
        return _parts(a, b, FEATURES) + diff_features.site_lines(a, b)
    return [f"family: {a.family} -> {b.family}"]


def _parts(a: Plan, b: Plan, names: tuple[str, ...]) -> list[str]:
    return [
        f"{name}{change}"
        for name in names
        for change in changes(getattr(a, name), getattr(b, name))
    ]
