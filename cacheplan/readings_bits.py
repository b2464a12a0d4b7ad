"""What a profile says about keys and values in few bits: predicted damage, and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cacheplan.errors import ProfileError
from cacheplan.plans.storage import (
    bare,
    divide,
    group_tokens,
    high_tier,
    packed,
    row_storage,
    tier_bytes,
)
from cacheplan.readings import Floats, candidate_index, context_length, sensitivities, statistic
from cacheplan.types import Entry, KVAction, KVProfile, LanguageSpec, Precision, Tier

Integers = NDArray[np.int64]
ELEMENT_BYTES = 2  # budgets count the cache as 16-bit numbers
_NEAR = 257  # lengths over which bytes are averaged
_TINY = 1e-12


class FewBits:
    """Predicted KL per token of whole actions, for one head alone.

    Errors of evicting tokens, of packed keys and of packed values add up, each times a sensitivity
    of its own: the divergence per unit of damage when that alone is done to the head.  Packed
    numbers weigh as much of a precision's damage as there are packed tokens among those that stay.
    The error of demoted tokens is the part that they have in the error of the coarsest precision;
    the tokens that stay have the rest of theirs.
    """

    def __init__(self, profile: KVProfile, *, weighed: bool = True) -> None:
        """ProfileError for a profile without bits; damage instead of KL unless `weighed`."""
        if not profile.keys:
            raise ProfileError(
                "The profile did not measure few bits: run `cacheplan profile` again with "
                "--recipe joint, for a model whose heads have a multiple of 4 channels."
            )
        self.profile, self.length = profile, context_length(profile)
        self.evicted = statistic(profile, "damage")
        weight = np.ones((*self.evicted.shape[:2], 2))  # [L, K, 2]
        if weighed:
            self.evicted = sensitivities(profile)[..., None] * self.evicted
            damage = np.maximum(statistic(profile, "coarse_damage"), _TINY)
            weight = statistic(profile, "coarse_kl") / damage
        self.packed = [
            weight[..., t, None] * statistic(profile, name)
            for t, name in enumerate(("key_damage", "value_damage"))
        ]
        self._found: dict[Tier, Floats] = {}
        self.parts: Floats | None = None
        if profile.demoted:
            coarse = np.stack([found[..., -1] for found in self.packed], -1)  # [L, K, 2]
            lost = statistic(profile, "demoted_damage") * weight[:, :, None, None]
            self.parts = np.clip(lost / np.maximum(coarse, _TINY)[:, :, None, None], 0, 1)

    def measured(self, action: KVAction) -> bool:
        """Whether the profile knows the choice of tokens and all precisions of `action`."""
        if bare(action) not in self.profile.candidates:
            return False
        if action.low is not None and self._demoted(action) is None:
            return False
        tiers = [_high(action), *([action.low] if action.low is not None else [])]
        return all(tier in self._found or self._known(tier) for tier in tiers)

    def _known(self, tier: Tier) -> bool:
        known = self.profile.keys, self.profile.values
        both = zip((tier.key, tier.value), known, strict=True)
        return all(not packed(precision) or _plain(precision) in own for precision, own in both)

    def kl(self, action: KVAction) -> Floats:
        """Predicted KL `[L, K]`; InputError or ProfileError for what was not measured."""
        index = candidate_index(self.profile, bare(action))
        if not self.measured(action):
            raise ProfileError(
                "The profile did not measure the precisions of this recipe: run "
                "`cacheplan profile` again with this release."
            )
        kept = max(1, round(action.keep * self.length))
        losers = self.length - kept
        tokens = divide(action, kept, losers)
        high = self._errors(_high(action)) * (tokens.high / kept)
        if action.low is None:
            evicted: Floats = self._at(self.evicted[:, :, index], action.keep) + high.sum(-1)
            return evicted
        assert self.parts is not None
        part = self._at(np.moveaxis(self.parts[:, :, self._demoted(action)], 2, -1), action.keep)
        low = self._errors(action.low) * (tokens.low / max(losers, 1))
        found: Floats = (part * low + (1 - part) * high).sum(-1)
        return found

    def _errors(self, tier: Tier) -> Floats:
        """KL of the whole context's keys, and values, in that tier, `[L, K, 2]`."""
        if tier not in self._found:
            found = np.zeros((*self.evicted.shape[:2], 2))
            for t, precision in enumerate((tier.key, tier.value)):
                if packed(precision):
                    known = (self.profile.keys, self.profile.values)[t]
                    found[..., t] = self.packed[t][..., known.index(_plain(precision))]
            self._found[tier] = found
        return self._found[tier]

    def _demoted(self, action: KVAction) -> int | None:
        index = self.profile.candidates.index(bare(action))
        return self.profile.demoted.index(index) if index in self.profile.demoted else None

    def _at(self, curves: Floats, keep: float) -> Floats:
        """Curves `[..., G]` over the keep fractions at `keep`, interpolated linearly."""
        keeps = self.profile.keeps
        g = int(np.clip(np.searchsorted(keeps, keep, "right") - 1, 0, len(keeps) - 2))
        t = np.clip((keep - keeps[g]) / (keeps[g + 1] - keeps[g]), 0, 1)
        found: Floats = (1 - t) * curves[..., g] + t * curves[..., g + 1]
        return found


def predicted_bits(profile: KVProfile, entries: Sequence[Entry]) -> float | None:
    """Predicted KL of a plan of which some entries have few bits; None if not all was measured."""
    if not profile.keys:
        return None
    few, total = FewBits(profile), 0.0
    for entry in entries:
        assert isinstance(entry.action, KVAction)
        if not few.measured(entry.action):
            return None
        kl = few.kl(entry.action)[profile.model.planned.index(entry.site.layer)]
        total += float(kl.sum() if entry.site.head is None else kl[entry.site.head])
    return total


def sums_checked(profile: KVProfile) -> list[tuple[KVAction, float]]:
    """The actions measured as a whole, and their damage over what the planner adds up for it."""
    few = FewBits(profile, weighed=False)
    checked = []
    for j, action in enumerate(profile.joint):
        if few.measured(action):
            whole = float(statistic(profile, "joint_damage")[..., j].sum())
            checked.append((action, whole / max(float(few.kl(action).sum()), _TINY)))
    return checked


def byte_share(action: KVAction, spec: LanguageSpec, length: int) -> float:
    """Share of a head's full bytes that it takes: at `length`, or on average near it if more.

    Near it means from three quarters to five quarters of `length`.  Tokens that fill no group stay
    as they are, so a share that is low at one length alone would not hold for any other.
    """
    near = np.unique(np.linspace(0.75 * length, 1.25 * length, _NEAR).round().clip(1))
    unit = spec.token_width * ELEMENT_BYTES
    mean = row_bytes_near(action, spec, near.astype(np.int64)).sum() / (near.sum() * unit)
    kept = min(length, max(1, round(action.keep * length)))
    widths = spec.key_width, spec.value_width
    here = row_storage(action, kept, length - kept, widths, ELEMENT_BYTES) / (length * unit)
    return max(here, float(mean))


def row_bytes_near(action: KVAction, spec: LanguageSpec, lengths: Integers) -> Integers:
    """`plans.storage.row_storage` of prompts of many lengths at once."""
    kept = np.clip(np.rint(action.keep * lengths), 1, lengths).astype(np.int64)
    losers, widths = lengths - kept, (spec.key_width, spec.value_width)
    high, low = high_tier(action), action.low
    tiers = [*([high] if high is not None else []), *([low] if low is not None else [])]
    residual = max((p.residual for tier in tiers for p in (tier.key, tier.value)), default=0)
    exact = kept if low is None else lengths
    total = np.zeros_like(lengths)
    for tier in tiers:
        size = group_tokens(tier)
        groups = (losers if tier is low else np.maximum(kept - residual, 0)) // size
        empty = tier_bytes(tier, 0, widths, ELEMENT_BYTES)
        total += empty + groups * (tier_bytes(tier, size, widths, ELEMENT_BYTES) - empty)
        exact = exact - groups * size
    found: Integers = total + exact * spec.token_width * ELEMENT_BYTES
    return found


def _high(action: KVAction) -> Tier:
    return Tier(key=action.key, value=action.value)


def _plain(precision: Precision) -> Precision:
    """As it was measured: without tokens that stay exact."""
    return replace(precision, residual=0)
