"""Plans as settings of the comparison: every recipe at every budget, and refined plans."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from picture_runs import Setting

import cacheplan
from cacheplan import api
from cacheplan.errors import InfeasibleError, ProfileError, UnsupportedError
from cacheplan.plans.io import dumps
from cacheplan.recipes import FEATURE_RECIPES
from cacheplan.types import FeaturePlan, FeatureProfile

REFINED = "planned, refined"


def plans(
    profile: FeatureProfile, budgets: tuple[float, ...], leave_out: dict[str, str]
) -> dict[tuple[str, float], FeaturePlan]:
    """By recipe and budget; `leave_out` is told why a recipe has none at all."""
    found: dict[tuple[str, float], FeaturePlan] = {}
    for name in FEATURE_RECIPES:
        reasons = []
        for budget in budgets:
            try:
                found[name, budget] = api.solve(profile, budget=budget, recipe=name)
            except (InfeasibleError, ProfileError, UnsupportedError) as error:
                reasons.append(str(error))
        if len(reasons) == len(budgets):
            leave_out[f"cacheplan {name}"] = reasons[0]
    return found


def refined(
    plan: FeaturePlan, profile: FeatureProfile, folder: Path, minutes: float
) -> FeaturePlan:
    """The plan after a search on the calibration prompts, which goes on where it was left."""
    digest = _digest(plan)
    done, state = folder / f"refined-{digest}.json", folder / f"refined-{digest}.part"
    if done.exists():
        found = api.load_plan(done)
        assert isinstance(found, FeaturePlan)
        return found
    found = api.refine(plan, profile, minutes=minutes, evaluations=100_000, state=state)
    api.save_plan(found, done)
    return found


def setting(name: str, plan: FeaturePlan) -> Setting:
    """The plan's method is its recipe's name; its knob tells plans of other profiles apart."""

    def install(pipe: Any) -> Any:
        return cacheplan.apply(pipe, plan)

    knob = f"budget {plan.budget.kept:g}, plan {_digest(plan)}"
    return Setting(f"cacheplan {name}", knob, install, online=plan.gate is not None, plain=False)


def _digest(plan: FeaturePlan) -> str:
    return hashlib.sha256(dumps(plan)).hexdigest()[:12]
