"""What a language model's profile says: statistics, checked, and what follows from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cacheplan.errors import ProfileError
from cacheplan.types import KVAction, KVProfile

Floats = NDArray[np.float64]
_OF_ALL = 0.03
_NEEDS = {  # what a statistic is measured with, where that is not always the case
    "ablation_kl": " with --ablate 8",
    "ablation_damage": " with --ablate 8",
    "block_distance": " with --ablate 8",
    "retrieval_score": ' with prompts that have "answers" whose words occur in the context',
}


def statistic(profile: KVProfile, name: str) -> Floats:
    """The mean of a statistic; raises ProfileError if it is absent or not usable."""
    if name not in profile.statistics:
        raise ProfileError(
            f'The profile has no statistic "{name}": run `cacheplan profile` again'
            f"{_NEEDS.get(name, '')}."
        )
    mean = profile.statistics[name].mean
    if not np.isfinite(mean).all() or (mean < 0).any():
        raise ProfileError(
            f'The statistic "{name}" holds NaN or negative numbers: run `cacheplan profile` again.'
        )
    return mean


def context_length(profile: KVProfile) -> int:
    """Mean length of the contexts, in tokens."""
    return round(float(statistic(profile, "context_length")))


def sensitivity(profile: KVProfile) -> Floats:
    """Divergence of the model per unit of a head's damage, `[L, K]`.

    The ratio of what ablating the head does to the model's output (KL) and to the head's own
    output, both summed over prompts and probes.
    """
    return _sensitivity(profile, list(range(len(profile.probes))))


def sensitivities(profile: KVProfile) -> Floats:
    """Divergence per unit of damage of evicting by each candidate, `[L, K, A]`.

    It is that of the ablations by the candidate's own kind of scorer, where there are any: tokens
    that differ in what they are for also differ in what their loss does.  On the embedded model it
    is a hundred times less at some heads for what a low-pass filter drops than for what attention
    does.  A little of the mean over all kinds (`_OF_ALL`) keeps it off zero, which few ablations
    may find by chance.
    """
    kinds = [profile.candidates[index].scorer.name for index, _ in profile.probes]
    mean = sensitivity(profile)
    found: dict[str, Floats] = {}
    for candidate in profile.candidates:
        name = candidate.scorer.name
        if name not in found:
            own = [p for p, kind in enumerate(kinds) if kind == name]
            alone = _sensitivity(profile, own) if own else mean
            found[name] = (alone + _OF_ALL * mean) / (1 + _OF_ALL)
    return np.stack([found[candidate.scorer.name] for candidate in profile.candidates], -1)


def _sensitivity(profile: KVProfile, probes: list[int]) -> Floats:
    divergence = statistic(profile, "ablation_kl")[..., probes].sum(-1)
    damage = statistic(profile, "ablation_damage")[..., probes].sum(-1)
    weight: Floats = divergence / np.maximum(damage, 1e-12)
    return weight


def measured(profile: KVProfile, action: KVAction) -> bool:
    """Whether the profile measured `action`, whatever its `keep`."""
    return replace(action, keep=1.0) in profile.candidates


def candidate_index(profile: KVProfile, action: KVAction) -> int:
    """Where the profile measured `action`, whatever its `keep`; ProfileError if it did not."""
    if not measured(profile, action):
        raise ProfileError(
            f'The profile did not measure the scorer "{action.scorer.name}" as this recipe uses '
            "it: run `cacheplan profile` again with --recipe and the recipe's name."
        )
    return profile.candidates.index(replace(action, keep=1.0))


def damage_at(profile: KVProfile, action: KVAction, keep: float) -> Floats:
    """Damage `[L, K]` of every head when `action` keeps the share `keep`, interpolated linearly."""
    curves = statistic(profile, "damage")[:, :, candidate_index(profile, action)]  # [L, K, G]
    found: Floats = np.apply_along_axis(
        lambda curve: np.interp(keep, profile.keeps, curve), -1, curves
    )
    return found
