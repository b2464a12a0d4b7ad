"""The steps that a published recipe computes, given a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cacheplan.errors import InfeasibleError
from cacheplan.schedules.groups import Group
from cacheplan.schedules.tables import Gram, between, site_index, statistic
from cacheplan.solvers.broadcast import Broadcast
from cacheplan.solvers.lookahead import LookAhead
from cacheplan.solvers.segments import forecast_costs, hold_costs, relative
from cacheplan.solvers.shortest_path import EqualKeys
from cacheplan.solvers.steps_mask import StepsMask
from cacheplan.solvers.threshold import Magnitude, Threshold
from cacheplan.solvers.union import bubbling_union, within_budget
from cacheplan.types import FeatureProfile, FeatureRecipe, FeatureSite, Schedule, Solution

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def forced_steps(profile: FeatureProfile, recipe: FeatureRecipe) -> Mask:
    """`[T]`: the first steps, the first of every denoiser, and what the recipe protects."""
    T = profile.model.steps
    forced = np.ones(T, np.bool_)
    forced[round(recipe.window[0] * T) : round(recipe.window[1] * T)] = False
    forced[: max(1, recipe.warmup)] = True
    forced[list(profile.model.expert_starts)] = True
    forced[-1] |= recipe.protect_last
    return forced


def problem(
    profile: FeatureProfile, recipe: FeatureRecipe, found: list[Group], kept: float
) -> Schedule:
    """The schedule problem: one row per group, costs averaged over its sites."""
    T, S = profile.model.steps, len(found)
    hold = np.stack([_mean(g, lambda s: _distance(profile, s, recipe)) for g in found])
    forecast = None
    if recipe.order:
        pairs = [_mean(g, lambda s: _pairs(profile, s, recipe)) for g in found]
        forecast = np.stack(pairs)
    rate = np.array([group.cost for group in found])
    fixed = 1 - T * math.fsum(rate.tolist())  # what no skip saves
    base = np.zeros(S)
    base[0] = fixed if fixed > 1e-12 else 0.0
    lengths = {}
    if recipe.segment is not None:
        mean = T / max(1, int((kept - base[0]) / rate.sum() + 1e-9))
        lengths = {
            "shortest": max(1, math.floor(recipe.segment[0] * mean)),
            "longest": min(T, math.ceil(recipe.segment[1] * mean)),
        }
    return Schedule(
        rate=rate,
        base=base,
        hold=hold_costs(hold, **lengths),
        forecast=None if forecast is None else forecast_costs(forecast),
        forced=np.tile(forced_steps(profile, recipe), (S, 1)),
        budget=kept,
        change=np.stack([_mean(g, lambda s: _change(profile, s)) for g in found]),
        ratios=np.tile(statistic(profile, "token_ratio"), (S, 1)),
    )


def published(
    profile: FeatureProfile, recipe: FeatureRecipe, found: list[Group], kept: float
) -> tuple[Mask, Solution | None, str]:
    """`[S, T]` computed steps of the groups, the solution they come from, and a status."""
    schedule = problem(profile, recipe, found, kept)
    if recipe.schedule == "interval":
        mask = _even(schedule)
        return mask, None, f"{int(mask[0].sum())} computed steps, evenly spread."
    solvers: dict[str, Callable[[Schedule], Solution]] = {
        "path": EqualKeys(),
        "recurrence": EqualKeys(exact=False),
        "lookahead": LookAhead(),
        "threshold": Threshold(),
        "magnitude": Magnitude(consecutive=profile.model.steps),
        "mask": StepsMask(),
        "broadcast": Broadcast(tuple(dict(recipe.ranges).get(g.sites[0].part, 1) for g in found)),
    }
    solution = solvers[recipe.schedule](schedule)
    mask = solution.choice.astype(bool)
    if recipe.donors:
        mask = _united(schedule, found, mask, recipe.donors)
        return mask, None, f"{solution.status} United and cut back to the budget."
    return mask, solution, solution.status


def _even(schedule: Schedule) -> Mask:
    """As many steps as the budget buys, the ones not forced evenly spread between those that are.

    They divide what lies between the warm-up and the protected last steps into equal stretches.
    """
    S, T = schedule.forced.shape
    forced = schedule.forced[0]
    most = int((schedule.budget - schedule.base.sum()) / schedule.rate.sum() + 1e-9)
    if most < forced.sum():
        least = schedule.base.sum() + schedule.rate.sum() * forced.sum()
        raise InfeasibleError(
            f"The budget {schedule.budget:.3g} buys {max(0, most)} computed steps, but "
            f"{forced.sum()} are always computed: the smallest feasible budget is "
            f"{math.ceil(1000 * least) / 1000:g}."
        )
    free = np.flatnonzero(~forced)
    wanted = min(most - int(forced.sum()), len(free))
    row = forced.copy()
    if wanted:
        start = int(free[0]) - 1  # the step before: the spread begins one stretch after it
        end = int(free[-1]) + 1  # T, or the first of the protected last steps
        stretch = (end - start) / (wanted + 1)
        places = [start + stretch * (i + 1) for i in range(wanted)]
        taken: set[int] = set(np.flatnonzero(forced).tolist())
        for place in places:
            step = min((s for s in range(T) if s not in taken), key=lambda s: abs(s - place))
            taken.add(step)
        row[list(taken)] = True
    return np.tile(row, (S, 1))


def _united(schedule: Schedule, found: list[Group], mask: Mask, donors: int) -> Mask:
    """BAC's union of the sites with the largest change from step to step, into later mlps."""
    assert schedule.change is not None
    steps = np.arange(mask.shape[1] - 1)
    errors = schedule.change[:, steps, steps + 1].mean(1)
    mlps = np.array([group.sites[0].part.startswith("mlp") for group in found])
    depths = np.array([group.sites[0].first for group in found])
    united = bubbling_union(mask, errors, depths=depths, count=donors, receivers=mlps)
    return within_budget(replace(schedule, forecast=None), united)


def _mean(group: Group, table: Callable[[FeatureSite], Floats]) -> Floats:
    found: Floats = np.mean([table(site) for site in group.sites], axis=0)
    return found


def _distance(profile: FeatureProfile, site: FeatureSite, recipe: FeatureRecipe) -> Floats:
    index = site_index(profile, site)
    if recipe.cost == "l1":
        return _upper(between(statistic(profile, "l1")[index]), profile.model.expert_starts)
    gram = Gram.of(profile, site)
    if recipe.cost == "square":
        return gram.hold()
    norm = np.sqrt(np.diag(gram.products))
    cosine = gram.products / np.maximum(norm[:, None] * norm[None, :], 1e-12)
    return _upper(np.where(np.isnan(cosine), np.inf, np.maximum(1 - cosine, 0)), gram.starts)


def _upper(table: Floats, starts: tuple[int, ...]) -> Floats:
    step = np.arange(len(table))
    found = np.where(step[:, None] >= step, np.inf, table)
    for start in starts:
        found[:start, start:] = np.inf
    return found


def _pairs(profile: FeatureProfile, site: FeatureSite, recipe: FeatureRecipe) -> Floats:
    return Gram.of(profile, site).forecast(recipe.basis, recipe.order)


def _change(profile: FeatureProfile, site: FeatureSite) -> Floats:
    """Mean absolute distance relative to the newer step, `[T, T]`."""
    table = statistic(profile, "l1")[site_index(profile, site)]
    distance = between(table)
    np.fill_diagonal(distance, 0)
    return relative(distance, table[:, 0])
