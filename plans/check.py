"""Whether a plan makes sense, whether it can be run, and whether it belongs to a model."""

from __future__ import annotations

from cacheplan.errors import UnsupportedError
from cacheplan.plans.check_features import (
    check_features,
    check_runnable_features,
    identity_features,
)
from cacheplan.plans.check_kv import check_kv, check_runnable_kv, identity_kv
from cacheplan.plans.rules import same_model
from cacheplan.types import KVPlan, LanguageSpec, ModelSpec, Plan


def check(plan: Plan) -> None:
    """Every rule a plan must obey on its own; PlanError for the first one broken.

    Types are taken as right: reading a file has checked them.
    """
    if isinstance(plan, KVPlan):
        check_kv(plan)
    else:
        check_features(plan)


def check_runnable(plan: Plan) -> None:
    """UnsupportedError, with what is supported instead, if the runtime cannot follow the plan."""
    if isinstance(plan, KVPlan):
        check_runnable_kv(plan)
    else:
        check_runnable_features(plan)


def check_model(plan: Plan, spec: ModelSpec) -> None:
    """ModelMismatchError naming the first thing in which `spec` is not the plan's model.

    `id` may differ, since one model has many paths; the digest tells whether it is the same.
    """
    same_model(plan.model, spec, _identity(plan.model), _identity(spec))


def kv_only(plan: Plan, doing: str) -> KVPlan:
    """The plan, where only those of language models can be followed; else UnsupportedError."""
    if isinstance(plan, KVPlan):
        return plan
    raise UnsupportedError(
        f"The plan is for the diffusion pipeline {plan.model.id}, which {doing} cannot follow yet; "
        "supported are plans of language models."
    )


def _identity(spec: ModelSpec) -> dict[str, object]:
    """What decides whether two models share plans, in the order in which to report it."""
    if isinstance(spec, LanguageSpec):
        return {"family": spec.family, **identity_kv(spec)}
    return {"family": spec.family, **identity_features(spec)}
