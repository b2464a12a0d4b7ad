"""Plans for KV caches that lack one part of the planner each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacheplan import api
from cacheplan.errors import InfeasibleError
from cacheplan.formulate import reached, realize
from cacheplan.formulate_bits import entries_of_bits, knapsack_of_bits, menu, reached_bytes
from cacheplan.formulate_heads import knapsack
from cacheplan.plans.storage import in_few_bits
from cacheplan.readings import context_length, sensitivity, statistic
from cacheplan.recipes import RECIPES
from cacheplan.solvers.proportional import divide
from cacheplan.solvers.registry import knapsack_solver
from cacheplan.types import (
    Budget,
    Entry,
    Knapsack,
    KVAction,
    KVPlan,
    KVProfile,
    KVRecipe,
    Site,
    Solution,
    Split,
    Statistic,
)

Floats = NDArray[np.float64]
PLANNED, JOINT = RECIPES["planned"], RECIPES["joint"]
OURS, BITS = "planned", "joint"  # what rows are compared with
SCORERS = {  # the planner's candidates, of which one alone is given to all heads
    "position": 0,
    "key norm": 2,
    "key difference": 3,
    "window attention": 5,
    "low-pass residual": 7,
}
_SLACK = 1e-9
EVALUATIONS, REFINED_ON = 4, 12  # of the closed loop, as in `peers/kv_ours.py`


@dataclass(frozen=True)
class Variant:
    """A plan without one part; `whole` is the plan that has it."""

    axis: str
    name: str
    whole: str
    plan: KVPlan


def variants(
    profile: KVProfile, budget: float, model: str | None, calibration: Path | None
) -> Iterator[Variant]:
    """All plans of one budget, first the two that lack nothing."""
    ours = api.solve(profile, budget=budget)
    yield Variant("", OURS, OURS, ours)
    makers = (_statistics, _solvers, _granularity, _scorers)
    for maker in makers:
        for axis, name, entries in maker(profile, ours.budget):
            yield Variant(axis, name, OURS, _with(ours, profile, entries))
    refined = api.refine(
        ours,
        profile,
        model=model,
        prompts=calibration,
        evaluations=EVALUATIONS,
        limit=REFINED_ON,
    )
    yield Variant("loop", "closed: refined on calibration prompts", OURS, refined)
    if not profile.keys:
        return
    joint = api.solve(profile, budget=budget, recipe="joint")
    yield Variant("", BITS, BITS, joint)
    for name, entries in _bits(profile, joint.budget):
        plan = replace(joint, entries=entries)
        share = reached_bytes(plan)
        yield Variant("bits", name, BITS, replace(plan, budget=replace(plan.budget, reached=share)))


Found = Iterator[tuple[str, str, tuple[Entry, ...]]]


def _with(plan: KVPlan, profile: KVProfile, entries: tuple[Entry, ...]) -> KVPlan:
    share = reached(profile, entries, None)
    return replace(plan, entries=entries, budget=replace(plan.budget, reached=share))


def _solved(profile: KVProfile, recipe: KVRecipe, budget: Budget) -> tuple[Entry, ...]:
    solution = _solve(knapsack(profile, recipe, budget.kept))
    return realize(profile, recipe, budget, solution)


def _solve(problem: Knapsack) -> Solution:
    return knapsack_solver("milp")(problem)


def _statistics(profile: KVProfile, budget: Budget) -> Found:
    """What a head's loss is measured by; heads still choose scorer and share by a knapsack."""
    energy = np.maximum(statistic(profile, "output_energy"), 1e-12)
    ones = _weighed_alike(profile, np.ones_like(energy))
    yield "statistic", "damage of the head's output, unweighted", _solved(ones, PLANNED, budget)
    relative = _weighed_alike(profile, 1 / energy)
    yield "statistic", "relative damage of the output", _solved(relative, PLANNED, budget)
    mean = _weighed_alike(profile, _layer_means(sensitivity(profile)))
    yield "statistic", "one sensitivity for each layer", _solved(mean, PLANNED, budget)
    alike = _weighed_alike(profile, sensitivity(profile))
    yield "statistic", "one sensitivity for all kinds of scorers", _solved(alike, PLANNED, budget)
    # attention mass is known for each layer, of tokens ranked by that very mass
    by_mass = replace(PLANNED, candidates=RECIPES["prefixkv"].candidates)
    curves = statistic(profile, "mass_curve")  # [L, M + 1]
    points = np.linspace(0, 1, curves.shape[1])
    lost = 1 - np.stack([np.interp(profile.keeps, points, curve) for curve in curves])
    yield (
        "statistic",
        "attention mass lost, ranked by it",
        _by_layer(profile, by_mass, budget, lost),
    )
    whole = knapsack(profile, by_mass, budget.kept).distortion
    own = whole.reshape(*energy.shape, -1).sum(1)
    name = "weighted damage, ranked by attention mass"
    yield "statistic", name, _by_layer(profile, by_mass, budget, own)


def _weighed_alike(profile: KVProfile, weight: Floats) -> KVProfile:
    """A profile that gives all scorers of a head the sensitivity `weight` `[L, K]`."""
    damage = profile.statistics["ablation_damage"]
    kl = damage.mean * weight[:, :, None]
    changed = Statistic(damage.axes, damage.count, kl, np.zeros_like(kl))
    return replace(profile, statistics={**profile.statistics, "ablation_kl": changed})


def _layer_means(weight: Floats) -> Floats:
    """The geometric mean over a layer's heads, `[L, K]`."""
    logs = np.log(np.maximum(weight, 1e-12)).mean(1, keepdims=True)
    return np.broadcast_to(np.exp(logs), weight.shape).copy()


def _by_layer(
    profile: KVProfile, recipe: KVRecipe, budget: Budget, distortion: Floats
) -> tuple[Entry, ...]:
    """One option for all heads of a layer; `distortion` `[L, options]`."""
    keeps = np.array(profile.keeps)
    rate = np.tile(keeps, distortion.shape[1] // len(keeps)) / len(distortion)
    found = _solve(Knapsack(np.broadcast_to(rate, distortion.shape), distortion, budget.kept))
    choice = np.repeat(found.choice, profile.model.kv_heads)
    return realize(profile, recipe, budget, replace(found, choice=choice))


def _solvers(profile: KVProfile, budget: Budget) -> Found:
    """How shares are divided by the same weighted damage; each head takes its best scorer."""
    curves = _curves(profile)
    length, heads = context_length(profile), len(curves)
    same = np.full(heads, budget.kept)
    yield "solver", "the same share for every head", _at(profile, curves, same)
    weight = np.array([_interpolated(profile, own, budget.kept).min() for own in curves])
    problem = Split(
        total=int(budget.kept * length * heads + 1e-9),
        lower=np.ones(heads, np.int64),
        upper=np.full(heads, length),
    )
    units = divide(problem, weight) / length
    yield "solver", "shares in proportion to damage", _at(profile, curves, units)
    yield (
        "solver",
        "one threshold on damage (PrefixKV's rule)",
        _at(profile, curves, threshold(curves.min(1), np.array(profile.keeps), budget.kept)),
    )


def _curves(profile: KVProfile) -> Floats:
    """Weighted damage of every head, candidate and share, `[heads, A, G]`."""
    problem = knapsack(profile, PLANNED, 1.0)
    return problem.distortion.reshape(profile.model.rows, len(PLANNED.candidates), -1)


def threshold(best: Floats, keeps: Floats, kept: float) -> Floats:
    """The share of each head at which its loss `best` `[heads, G]` first falls to one threshold.

    The threshold is the lowest that the mean share `kept` allows.
    """
    falling = np.minimum.accumulate(best, axis=1)

    def shares(level: float) -> Floats:
        found: Floats = keeps[(falling <= level).argmax(1)]
        return found

    levels = np.unique(falling[falling >= falling.min(1).max()])
    low, high = 0, len(levels) - 1  # the highest level keeps the least
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if shares(levels[middle]).mean() <= kept + _SLACK else (middle + 1, high)
        )
    return shares(float(levels[low]))


def _interpolated(profile: KVProfile, curves: Floats, keep: float) -> Floats:
    """Curves `[A, G]` at one share, `[A]`."""
    return np.array([np.interp(keep, profile.keeps, curve) for curve in curves])


def _at(profile: KVProfile, curves: Floats, shares: Floats) -> tuple[Entry, ...]:
    """Every head with its share and the candidate that loses least there."""
    spec, entries = profile.model, []
    for site, (own, share) in enumerate(zip(curves, shares.tolist(), strict=True)):
        layer, head = divmod(site, spec.kv_heads)
        best = int(_interpolated(profile, own, share).argmin())
        action = replace(PLANNED.candidates[best], keep=share)
        entries.append(Entry(site=Site(layer=spec.planned[layer], head=head), action=action))
    return tuple(entries)


def _granularity(profile: KVProfile, budget: Budget) -> Found:
    curves = _curves(profile).reshape(len(profile.model.planned), profile.model.kv_heads, -1)
    entries = _by_layer(profile, PLANNED, budget, curves.sum(1))
    yield "granularity", "one choice for each layer", entries
    share = budget.kept
    whole = _curves(profile).sum(0)
    best = int(_interpolated(profile, whole, share).argmin())
    action = replace(PLANNED.candidates[best], keep=share)
    sites = [Site(layer=layer) for layer in profile.model.planned]
    everywhere = tuple(Entry(site=site, action=action) for site in sites)
    yield "granularity", "one choice for all", everywhere


def _scorers(profile: KVProfile, budget: Budget) -> Found:
    """One scorer for every head, shares by the knapsack."""
    for name, place in SCORERS.items():
        recipe = replace(PLANNED, candidates=(PLANNED.candidates[place],))
        yield "scorer", f"{name} alone", _solved(profile, recipe, budget)


def _bits(profile: KVProfile, budget: Budget) -> Iterator[tuple[str, tuple[Entry, ...]]]:
    """Parts of the menu of tokens and bits."""
    options = menu(profile, JOINT, budget)
    try:
        problem = knapsack_of_bits(profile, JOINT, budget)
    except InfeasibleError:
        return

    def among(allowed: Callable[[KVAction], bool]) -> Solution | None:
        usable = np.array([allowed(option) for option in options])
        rate = np.where(usable, problem.rate, np.inf)
        distortion = np.where(usable, problem.distortion, np.inf)
        try:
            return _solve(Knapsack(rate, distortion, problem.budget))
        except InfeasibleError:
            return None

    parts: dict[str, Callable[[KVAction], bool]] = {
        "tokens alone": lambda option: not in_few_bits(option),
        "bits alone": lambda option: option.keep == 1.0,
        "tokens and bits, none demoted": lambda option: option.low is None,
    }
    found: dict[str, Solution | None] = {name: among(usable) for name, usable in parts.items()}
    formats = [among(_stored_as(tier.key, tier.value)) for tier in JOINT.formats]
    able = [solution for solution in formats if solution is not None]
    found["tokens, and one precision for all"] = min(able, key=lambda s: s.value, default=None)
    for name, solution in found.items():
        if solution is not None:
            yield name, entries_of_bits(profile, JOINT, budget, solution)


def _stored_as(key: Any, value: Any) -> Callable[[KVAction], bool]:
    return lambda option: (option.key, option.value, option.low) == (key, value, None)
