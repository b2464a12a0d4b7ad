"""Recipes in few bits as knapsacks: which tokens and which precision, for a head or for a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cacheplan.errors import InfeasibleError
from cacheplan.plans.rows import cache_bytes, full_bytes
from cacheplan.plans.storage import bare, in_few_bits
from cacheplan.readings_bits import ELEMENT_BYTES, FewBits, byte_share
from cacheplan.types import (
    Budget,
    Entry,
    Knapsack,
    KVAction,
    KVPlan,
    KVProfile,
    KVRecipe,
    Position,
    Site,
    Solution,
)


def chooses_bits(recipe: KVRecipe) -> bool:
    """Whether the recipe's bytes are not those of its tokens alone."""
    few = any(in_few_bits(candidate) for candidate in recipe.candidates)
    return few or bool(recipe.formats or recipe.demotions)


def knapsack_of_bits(profile: KVProfile, recipe: KVRecipe, budget: Budget) -> Knapsack:
    """One site per head ("joint") or per layer; rates are shares of the full cache's bytes.

    Distortions are predicted KL.  Shares are those of `byte_share` at the budget's length, with
    all scales, groups that are not full and tokens kept exact.  Raises InfeasibleError naming the
    smallest feasible budget.
    """
    spec, few = profile.model, FewBits(profile)
    options = menu(profile, recipe, budget)
    assert budget.length is not None
    # how tokens are chosen makes no difference to their bytes
    stored = [replace(action, scorer=Position(), sinks=0, recent=0) for action in options]
    share_of = {action: byte_share(action, spec, budget.length) for action in dict.fromkeys(stored)}
    shares = np.array([share_of[action] for action in stored])
    if shares.min() > budget.kept:
        raise InfeasibleError(
            f'The budget "{budget.asked}" is below what {recipe.name} stores at least, scales and '
            f"tokens outside of whole groups included: the smallest feasible budget is "
            f"{_up(shares.min()):g}."
        )
    kl = np.stack([few.kl(action) for action in options], -1)  # [L, K, options]
    if recipe.allocation != "joint":
        kl = kl.sum(1, keepdims=True)
    sites = kl.shape[0] * kl.shape[1]
    rate = np.broadcast_to(shares / sites, (sites, len(options)))
    return Knapsack(rate, kl.reshape(sites, -1), budget.kept)


def entries_of_bits(
    profile: KVProfile, recipe: KVRecipe, budget: Budget, solution: Solution
) -> tuple[Entry, ...]:
    """The option chosen at every site of `knapsack_of_bits`."""
    spec, options = profile.model, menu(profile, recipe, budget)
    heads: Sequence[int | None] = range(spec.kv_heads) if recipe.allocation == "joint" else [None]
    sites = [Site(layer=layer, head=head) for layer in spec.planned for head in heads]
    chosen = [options[index] for index in solution.choice.tolist()]
    return tuple(Entry(site=s, action=a) for s, a in zip(sites, chosen, strict=True))


def reached_bytes(plan: KVPlan) -> float:
    """Share of the full cache's bytes at the budget's length, as the runtime will store them."""
    length = plan.budget.length
    assert length is not None
    stored = cache_bytes(plan, length, ELEMENT_BYTES)
    return stored / full_bytes(plan.model, length, ELEMENT_BYTES)


def menu(profile: KVProfile, recipe: KVRecipe, budget: Budget) -> list[KVAction]:
    """What may be done at a site, the same at all of them.

    `keep` is a whole number of tokens of the budget's length: what is stored there is then known
    to the byte.
    """
    length = budget.length
    assert length is not None
    if recipe.allocation == "fixed":
        (action,) = recipe.candidates
        return [replace(action, keep=_whole(action.keep, length))]
    if recipe.allocation == "uniform":
        (action,) = recipe.candidates
        return [_most(profile, action, budget)]
    plain = [bare(candidate) for candidate in recipe.candidates]
    formats = [
        replace(action, key=tier.key, value=tier.value)
        for action in plain
        for tier in recipe.formats
    ]
    if recipe.allocation == "layers":
        return formats
    demoted = [
        replace(action, key=high.key, value=high.value, losers="demote", low=low)
        for action in plain
        if profile.candidates.index(action) in profile.demoted
        for high, low in recipe.demotions
    ]
    keeps = list(dict.fromkeys(_whole(keep, length) for keep in profile.keeps))
    whole = [a for a in (*plain, *formats) if bare(a) == plain[0]]  # who keeps all need not choose
    return [
        replace(action, keep=keep)
        for keep in keeps
        for action in ((*plain, *formats, *demoted) if keep < 1 else whole)
    ]


def _most(profile: KVProfile, action: KVAction, budget: Budget) -> KVAction:
    """The action with as many tokens as the budget allows; with one, where that is too many."""
    assert budget.length is not None
    for kept in range(budget.length, 0, -1):
        found = replace(action, keep=kept / budget.length)
        if byte_share(found, profile.model, budget.length) <= budget.kept:
            return found
    return replace(action, keep=1 / budget.length)


def _whole(keep: float, length: int) -> float:
    return max(1, int(keep * length + 1e-9)) / length


def _up(share: float) -> float:
    """Rounded up to four digits, so that asking for it succeeds."""
    return float(np.ceil(share * 1e4) / 1e4)
