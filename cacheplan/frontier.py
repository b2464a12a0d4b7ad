"""The whole curve of damage over budget, from one profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cacheplan import api
from cacheplan.errors import InfeasibleError, InputError
from cacheplan.types import FeatureDamage, Profile

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
    wrong = [budget for budget in budgets if not 0 < budget <= 1]
    if wrong:
        raise InputError(f"The budget {wrong[0]:g} is not a share above 0 and at most 1.")
    points, missing = [], []
    pairs = [(recipe, budget) for recipe in recipes for budget in budgets]
    for number, (recipe, budget) in enumerate(pairs):
        if progress:
            progress(number, len(pairs), f"{recipe} at {budget:g}")
        try:
            points.append(_point(profile, recipe, budget))
        except InfeasibleError as error:
            missing.append(f"{recipe} at {budget:g} is left out: {error}")
    if progress:
        progress(len(pairs), len(pairs), "done")
    if not points:
        raise InputError(f"No recipe meets any of the budgets: {missing[0]}")
    return points, missing


def _point(profile: Profile, recipe: str, budget: float) -> Point:
    plan = api.solve(profile, budget=budget, recipe=recipe)
    predicted = plan.predicted
    damage: float | None = None
    if predicted is not None:
        damage = predicted.error if isinstance(predicted, FeatureDamage) else predicted.kl
    # a bound is in the solver's own objective, which is the damage for these alone
    bound = plan.certificate.bound if recipe in ("planned", "joint") else None
    return Point(
        recipe=recipe, budget=budget, reached=plan.budget.reached, damage=damage, bound=bound
    )
