"""Choices head by head: measured damage, classes of heads, and the heads that rank for a layer."""

from __future__ import annotations

import numpy as np

from cacheplan.readings import Floats, candidate_index, context_length, sensitivities, statistic
from cacheplan.types import Knapsack, KVProfile, KVRecipe, TwoClasses


def knapsack(profile: KVProfile, recipe: KVRecipe, kept: float) -> Knapsack:
    """One site per kv head, one option per candidate and keep fraction.

    Rates are fractions of the full cache, distortions predicted KL.
    """
    spec = profile.model
    columns = [candidate_index(profile, candidate) for candidate in recipe.candidates]
    damage = statistic(profile, "damage")[:, :, columns]  # [L, K, A, G]
    distortion = sensitivities(profile)[:, :, columns, None] * damage
    rate = np.broadcast_to(np.array(profile.keeps) / spec.rows, damage.shape)
    shape = spec.rows, damage.shape[2] * damage.shape[3]
    return Knapsack(rate.reshape(shape), distortion.reshape(shape), kept)


def streaming_share(kept: float, heads: int, whole: int) -> float:
    """What each other head keeps when `whole` of the heads keep everything."""
    return (kept * heads - whole) / (heads - whole)


def two_classes(profile: KVProfile, recipe: KVRecipe, kept: float) -> TwoClasses:
    """Predicted KL of each head at the share that each number of whole heads leaves it.

    All heads whole is no division of its own: that is a share of 1 for each.
    """
    (candidate,) = recipe.candidates
    index = candidate_index(profile, candidate)
    curves = sensitivities(profile)[:, :, index, None] * statistic(profile, "damage")[:, :, index]
    curves = curves.reshape(profile.model.rows, -1)  # [S, G]
    heads = len(curves)
    cost = np.full((heads, heads + 1), np.inf)
    for whole in range(heads):
        share = streaming_share(kept, heads, whole)
        if share >= 1 / context_length(profile):
            cost[:, whole] = [np.interp(share, profile.keeps, curve) for curve in curves]
    return TwoClasses(cost)


def ranking_heads(profile: KVProfile, count: int) -> list[tuple[int, ...]]:
    """The query heads of each planned layer with the highest retrieval scores, ascending."""
    scores: Floats = statistic(profile, "retrieval_score")  # [L, H]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return [tuple(sorted(row)) for row in best.tolist()]
