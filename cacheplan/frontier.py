"""The whole curve of damage over budget, from one profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cacheplan import api
from cacheplan.errors import (
    CacheplanError,
    InfeasibleError,
    InputError,
    ProfileError,
    UnsupportedError,
)
from cacheplan.recipes import FEATURE_RECIPES, RECIPES
from cacheplan.types import FeatureDamage, KVProfile, Plan, Profile

BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One plan of the curve.

    `damage` is what the profile predicts: KL per token in nats, or the relative error of the final
    latent; None where it predicts nothing for this recipe.  `bound` is proven: no plan of the
    recipe's choices does less damage.  `reached` is the share of cache or compute in use.
    """

    recipe: str
    budget: float
    reached: float
    damage: float | None
    bound: float | None


def frontier(
    profile: Profile,
    *,
    recipes: Sequence[str] = ("planned",),
    budgets: Sequence[float] = BUDGETS,
    progress: Progress | None = None,
) -> tuple[list[Point], list[str]]:
    """Solve every recipe at every budget; also returns a sentence for each point left out.

    A budget that a recipe cannot meet is left out; any other error is raised.  Raises InputError
    for budgets outside of (0, 1] and if no point is left.
    """
    plans, missing = solve_all(profile, recipes=recipes, budgets=budgets, progress=progress)
    return [_point(plan, *pair) for pair, plan in plans.items()], missing


def solve_all(
    profile: Profile,
    *,
    recipes: Sequence[str],
    budgets: Sequence[float],
    command: str = "",
    progress: Progress | None = None,
) -> tuple[dict[tuple[str, float], Plan], list[str]]:
    """The plans of every recipe at every budget, and a sentence for each that there is not.

    ["all"] are all recipes for this kind of model, of which those are left out too that the model
    or the profile does not allow.  Otherwise like `frontier`.
    """
    wrong = [budget for budget in budgets if not 0 < budget <= 1]
    if wrong:
        raise InputError(f"The budget {wrong[0]:g} is not a share above 0 and at most 1.")
    refusals: tuple[type[CacheplanError], ...] = (InfeasibleError,)
    if list(recipes) == ["all"]:
        recipes = list(RECIPES if isinstance(profile, KVProfile) else FEATURE_RECIPES)
        refusals = (InfeasibleError, UnsupportedError, ProfileError)
    plans: dict[tuple[str, float], Plan] = {}
    missing = []
    pairs = [(recipe, budget) for recipe in dict.fromkeys(recipes) for budget in budgets]
    for number, (recipe, budget) in enumerate(pairs):
        if progress:
            progress(number, len(pairs), f"{recipe} at {budget:g}")
        try:
            plans[recipe, budget] = api.solve(
                profile, budget=budget, recipe=recipe, command=command
            )
        except refusals as error:
            missing.append(f"{recipe} at {budget:g} is left out: {error}")
    if progress:
        progress(len(pairs), len(pairs), "done")
    if not plans:
        raise InputError(f"No recipe meets any of the budgets: {missing[0]}")
    return plans, missing


def _point(plan: Plan, recipe: str, budget: float) -> Point:
    predicted = plan.predicted
    damage: float | None = None
    if predicted is not None:
        damage = predicted.error if isinstance(predicted, FeatureDamage) else predicted.kl
    # a bound is in the solver's own objective, which is the damage for these alone
    bound = plan.certificate.bound if recipe in ("planned", "joint") else None
    return Point(
        recipe=recipe, budget=budget, reached=plan.budget.reached, damage=damage, bound=bound
    )
