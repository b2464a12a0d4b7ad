"""From a profile, a recipe and a budget to a problem, and from its solution to plan entries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cacheplan.errors import InputError, ProfileError
from cacheplan.types import (
    AccumulatedAttention,
    Budget,
    Entry,
    Knapsack,
    KVAction,
    KVProfile,
    KVRecipe,
    Site,
    Solution,
    Split,
)

Floats = NDArray[np.float64]
_STATE_BYTES, _ELEMENT_BYTES = 4, 2  # accumulated score per token; 16-bit keys and values


def statistic(profile: KVProfile, name: str) -> Floats:
    """The mean of a statistic; raises ProfileError if it is absent or not usable."""
    if name not in profile.statistics:
        raise ProfileError(
            f'The profile has no statistic "{name}": run `cacheplan profile` again'
            + (" with --ablate 8." if name.startswith("ablation") else ".")
        )
    mean = profile.statistics[name].mean
    if not np.isfinite(mean).all() or (mean < 0).any():
        raise ProfileError(
            f'The statistic "{name}" holds NaN or negative numbers: run `cacheplan profile` again.'
        )
    return mean


def sensitivity(profile: KVProfile) -> Floats:
    """Divergence of the model per unit of a head's damage, `[L, K]`.

    The ratio of what ablating the head does to the model's output (KL) and to the head's own
    output, both summed over prompts and probes.
    """
    divergence = statistic(profile, "ablation_kl").sum(-1)
    damage = statistic(profile, "ablation_damage").sum(-1)
    weight: Floats = divergence / np.maximum(damage, 1e-12)
    return weight


def candidate_index(profile: KVProfile, action: KVAction) -> int:
    """Where the profile measured `action`, whatever its `keep`."""
    wanted = replace(action, keep=1.0)
    if wanted not in profile.candidates:
        raise InputError(
            f'The profile did not measure the scorer "{action.scorer.name}" as this recipe uses '
            "it: run `cacheplan profile` again with this release."
        )
    return profile.candidates.index(wanted)


def predict(profile: KVProfile, entries: tuple[Entry, ...]) -> float:
    """Predicted KL per token: sensitivity times damage, summed over heads.

    Damage between measured keep fractions is interpolated linearly.
    """
    damage, weight = statistic(profile, "damage"), sensitivity(profile)
    total = 0.0
    for entry in entries:
        assert isinstance(entry.action, KVAction)
        a, layer = candidate_index(profile, entry.action), entry.site.layer
        heads = range(profile.model.kv_heads) if entry.site.head is None else [entry.site.head]
        for h in heads:
            at = np.interp(entry.action.keep, profile.keeps, damage[layer, h, a])
            total += float(weight[layer, h] * at)
    return total


def formulate(profile: KVProfile, recipe: KVRecipe, budget: Budget) -> Knapsack | Split:
    """The problem whose solution says how much each site keeps.

    "knapsack": one site per kv head, one option per candidate and keep fraction; rates are
    fractions of the full cache, distortions predicted KL.  "prefix" and "uniform": tokens of
    each layer at the profile's mean context length.
    """
    spec = profile.model
    heads = spec.layers * spec.kv_heads
    if recipe.allocation == "knapsack":
        columns = [candidate_index(profile, candidate) for candidate in recipe.candidates]
        damage = statistic(profile, "damage")[:, :, columns]  # [L, K, A, G]
        distortion = sensitivity(profile)[:, :, None, None] * damage
        rate = np.broadcast_to(np.array(profile.keeps) / heads, damage.shape)
        shape = heads, damage.shape[2] * damage.shape[3]
        return Knapsack(rate.reshape(shape), distortion.reshape(shape), budget.kept)
    length = round(float(statistic(profile, "context_length")))
    (candidate,) = recipe.candidates
    kept = budget.kept * _useful(profile, candidate, recipe.decode_every)
    total = int(kept * length * spec.layers + 1e-9)
    least = min(max(1, candidate.sinks + candidate.recent), max(1, total // spec.layers))
    curves = statistic(profile, "mass_curve")
    points = np.linspace(0, curves.shape[1] - 1, length + 1)
    return Split(
        total=total,
        lower=np.full(spec.layers, least),
        upper=np.full(spec.layers, length),
        curves=tuple(np.interp(points, np.arange(len(curve)), curve) for curve in curves),
    )


def realize(
    profile: KVProfile, recipe: KVRecipe, budget: Budget, solution: Solution
) -> tuple[Entry, ...]:
    """Turn a solution into what is done at every site."""
    spec = profile.model
    if recipe.allocation == "knapsack":
        entries = []
        for site, option in enumerate(solution.choice.tolist()):
            layer, head = divmod(site, spec.kv_heads)
            a, g = divmod(option, len(profile.keeps))
            keep = profile.keeps[g]
            chosen = recipe.candidates[0 if keep == 1.0 else a]  # who keeps all need not choose
            action = replace(chosen, keep=keep)
            entries.append(Entry(site=Site(layer=layer, head=head), action=action))
        return tuple(entries)
    (candidate,) = recipe.candidates
    if recipe.allocation == "uniform":
        # the share itself rather than its tokens at one length: it then holds at every length
        share = budget.kept * _useful(profile, candidate, recipe.decode_every)
        keeps = [share] * spec.layers
    else:
        length = round(float(statistic(profile, "context_length")))
        keeps = [units / length for units in solution.choice.tolist()]
    return tuple(
        Entry(site=Site(layer=layer), action=replace(candidate, keep=keep))
        for layer, keep in enumerate(keeps)
    )


def reached(profile: KVProfile, entries: tuple[Entry, ...], decode_every: int | None) -> float:
    """The fraction of the full cache's bytes that the entries keep."""
    spec = profile.model
    total = 0.0
    for entry in entries:
        assert isinstance(entry.action, KVAction)
        heads = spec.kv_heads if entry.site.head is None else 1
        total += heads * entry.action.keep / _useful(profile, entry.action, decode_every)
    return total / (spec.layers * spec.kv_heads)


def _useful(profile: KVProfile, action: KVAction, decode_every: int | None) -> float:
    """Share of a kept token's bytes that are key and value rather than score state."""
    if decode_every is None or not isinstance(action.scorer, AccumulatedAttention):
        return 1.0
    row = profile.model.token_width * _ELEMENT_BYTES
    return row / (row + _STATE_BYTES)
