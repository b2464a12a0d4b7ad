"""From a profile, a recipe and a budget to a problem, and from its solution to plan entries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cacheplan.formulate_bits import chooses_bits, entries_of_bits, knapsack_of_bits
from cacheplan.formulate_heads import knapsack, ranking_heads, streaming_share, two_classes
from cacheplan.formulate_layers import division, split
from cacheplan.plans.rows import row_bytes
from cacheplan.plans.storage import bare, in_few_bits
from cacheplan.readings import candidate_index, measured, sensitivities, statistic
from cacheplan.readings_bits import predicted_bits
from cacheplan.types import (
    Budget,
    Entry,
    Knapsack,
    KVAction,
    KVProfile,
    KVRecipe,
    Site,
    Solution,
    Split,
    Trigger,
    TwoClasses,
    WindowAttention,
)

_ELEMENT_BYTES = 2  # budgets count the cache as 16-bit numbers


def predict(profile: KVProfile, entries: tuple[Entry, ...]) -> float | None:
    """Predicted KL per token: sensitivity times damage, summed over heads.

    Damage between measured keep fractions is interpolated linearly.  None if the profile did not
    measure what is done: heads that rank for their layer are known only after profiling.
    """
    damage, weight = statistic(profile, "damage"), sensitivities(profile)
    if any(isinstance(e.action, KVAction) and in_few_bits(e.action) for e in entries):
        return predicted_bits(profile, entries)
    total = 0.0
    for entry in entries:
        assert isinstance(entry.action, KVAction)
        if not measured(profile, entry.action):
            return None
        a = candidate_index(profile, entry.action)
        layer = profile.model.planned.index(entry.site.layer)
        heads = range(profile.model.kv_heads) if entry.site.head is None else [entry.site.head]
        for h in heads:
            at = np.interp(entry.action.keep, profile.keeps, damage[layer, h, a])
            total += float(weight[layer, h, a] * at)
    return total


def formulate(
    profile: KVProfile, recipe: KVRecipe, budget: Budget
) -> Knapsack | TwoClasses | Split:
    """The problem whose solution says how much each site keeps.

    "knapsack" and "classes" choose head by head, on the whole cache; the others divide the tokens
    of the profile's mean context length among layers.
    """
    for candidate in recipe.candidates:
        candidate_index(profile, bare(candidate))  # refuse a profile that knows not the recipe
    if chooses_bits(recipe):
        return knapsack_of_bits(profile, recipe, budget)
    if recipe.allocation == "knapsack":
        return knapsack(profile, recipe, budget.kept)
    if recipe.allocation == "classes":
        return two_classes(profile, recipe, budget.kept)
    return split(profile, recipe, _kept(profile, recipe, budget))


def realize(
    profile: KVProfile, recipe: KVRecipe, budget: Budget, solution: Solution
) -> tuple[Entry, ...]:
    """Turn a solution into what is done at every site."""
    if chooses_bits(recipe):
        return entries_of_bits(profile, recipe, budget, solution)
    if recipe.allocation == "knapsack":
        return _chosen(profile, recipe, solution)
    if recipe.allocation == "classes":
        return _classed(profile, recipe, budget, solution)
    spec, kept = profile.model, _kept(profile, recipe, budget)
    (candidate,) = recipe.candidates
    if recipe.allocation == "uniform":
        # the share itself rather than its tokens at one length: it then holds at every length
        keeps = [kept] * len(spec.planned)
    else:
        parts = division(profile, recipe, kept)
        keeps = [(parts.first + units) / parts.length for units in solution.choice.tolist()]
    actions = [replace(candidate, keep=keep) for keep in keeps]
    if recipe.ranking_heads:
        assert isinstance(candidate.scorer, WindowAttention)
        heads = ranking_heads(profile, recipe.ranking_heads)
        actions = [
            replace(action, scorer=replace(candidate.scorer, heads=chosen))
            for action, chosen in zip(actions, heads, strict=True)
        ]
    return tuple(
        Entry(site=Site(layer=layer), action=action)
        for layer, action in zip(spec.planned, actions, strict=True)
    )


def reached(profile: KVProfile, entries: tuple[Entry, ...], decode_every: int | None) -> float:
    """The fraction of the full cache's bytes that the entries keep."""
    spec = profile.model
    total = 0.0
    for entry in entries:
        assert isinstance(entry.action, KVAction)
        heads = spec.kv_heads if entry.site.head is None else 1
        total += heads * entry.action.keep / _useful(profile, entry.action, decode_every)
    return total / spec.rows


def _chosen(profile: KVProfile, recipe: KVRecipe, solution: Solution) -> tuple[Entry, ...]:
    """The option of each head of a knapsack."""
    spec = profile.model
    entries = []
    for site, option in enumerate(solution.choice.tolist()):
        layer, head = divmod(site, spec.kv_heads)
        a, g = divmod(option, len(profile.keeps))
        keep = profile.keeps[g]
        chosen = recipe.candidates[0 if keep == 1.0 else a]  # who keeps all need not choose
        action = replace(chosen, keep=keep)
        entries.append(Entry(site=Site(layer=spec.planned[layer], head=head), action=action))
    return tuple(entries)


def _classed(
    profile: KVProfile, recipe: KVRecipe, budget: Budget, solution: Solution
) -> tuple[Entry, ...]:
    """Whole heads, and streaming ones that share the rest."""
    spec = profile.model
    (candidate,) = recipe.candidates
    whole = solution.choice.tolist()
    share = streaming_share(budget.kept, spec.rows, sum(whole))
    entries = []
    for site, stays in enumerate(whole):
        layer, head = divmod(site, spec.kv_heads)
        action = replace(candidate, keep=1.0 if stays else share)
        entries.append(Entry(site=Site(layer=spec.planned[layer], head=head), action=action))
    return tuple(entries)


def _kept(profile: KVProfile, recipe: KVRecipe, budget: Budget) -> float:
    """The share of tokens that the budget leaves to a recipe with one candidate."""
    return budget.kept * _useful(profile, recipe.candidates[0], recipe.decode_every)


def _useful(profile: KVProfile, action: KVAction, decode_every: int | None) -> float:
    """Share of a kept token's bytes that are key and value rather than score or bias."""
    spec, trigger = profile.model, Trigger(decode_every=decode_every)
    return spec.token_width * _ELEMENT_BYTES / row_bytes([action], spec, _ELEMENT_BYTES, trigger)
