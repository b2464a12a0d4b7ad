"""Precisions of keys and values by name, and the published methods that store few bits.

Keys are packed per channel, in groups of consecutive tokens (KIVI, arXiv 2402.02750), or per token,
which needs no whole groups and so suits short rows; values per token.  Codes come with a float16
scale and zero, so that b bits per channel in groups of g tokens cost b + 32 / g.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cacheplan.plans.storage import bare, packed
from cacheplan.types import (
    AccumulatedAttention,
    KeyDifference,
    KVAction,
    KVRecipe,
    LanguageSpec,
    Position,
    Precision,
    Tier,
    WindowAttention,
)

MODEL = Precision()
FP8 = Precision(format="float", bits=8)


def by_token(bits: int, group: int | None = None, *, separable: bool = False) -> Precision:
    """Integers with a scale for each token and `group` channels (None: all)."""
    return Precision(format="int", bits=bits, group=group, separable=separable)


def by_channel(bits: int, group: int) -> Precision:
    """Integers with a scale for each channel and `group` tokens."""
    return Precision(format="int", bits=bits, axis="channel", group=group)


K8, K4, K2 = by_token(8), by_channel(4, 64), by_channel(2, 64)
K4_SHORT, K2_SHORT, K2_FINE = by_token(4), by_token(2), by_channel(2, 32)
V8, V4, V2 = by_token(8), by_token(4), by_token(2)
V2_FINE = by_token(2, 64)  # the same as V2 in heads of up to 64 channels

# what heads are ablated by comes last: the coarsest that is still useful
_KEYS = (MODEL, K8, FP8, K4, K4_SHORT, K2, K2_SHORT, K2_FINE)
_VALUES = (MODEL, V8, FP8, V4, V2_FINE, V2)

FORMATS = tuple(
    Tier(key=key, value=value)
    for key in _KEYS
    for value in _VALUES
    if key != MODEL or value != MODEL
)
# precisions of tokens that stay, and of those that are demoted
DEMOTIONS = tuple(
    (Tier(key=key, value=value), Tier(key=low_key, value=low_value))
    for key, value in ((K8, V8), (K8, V4), (K4, V4), (K4_SHORT, V4))
    for low_key, low_value in ((K4, V2), (K4_SHORT, V2), (K2, V2), (K2_FINE, V2), (K2_FINE, V4))
    if key.bits > low_key.bits or value.bits > low_value.bits
)

_SNAPKV = KVAction(keep=1.0, scorer=WindowAttention(), recent=32)
_SHORT = KVAction(keep=1.0, scorer=WindowAttention(window=16, pool=1), sinks=1, recent=8)
_UNLIKE = KVAction(keep=1.0, scorer=KeyDifference(), sinks=1, recent=8)
_ALL = KVAction(keep=1.0, scorer=Position(), sinks=4)  # where all stay, who chooses is nothing
_DEMOTING = (_SNAPKV, _SHORT, _UNLIKE)  # of the planner's candidates


def _plain(name: str, summary: str, key: Precision, value: Precision) -> KVRecipe:
    return KVRecipe(
        name=name,
        summary=f"{summary}; under a budget below that, of the tokens SnapKV keeps",
        paper="baseline: round to nearest",
        allocation="uniform",
        candidates=(replace(_SNAPKV, key=key, value=value),),
    )


BIT_ROWS = (
    _plain("int8", "everything in 8 bits", K8, V8),
    _plain("fp8", "everything in 8-bit floats", FP8, FP8),
    _plain("int4", "everything in 4 bits", K4_SHORT, V4),
    _plain("int2", "everything in 2 bits, keys per channel", K2, V2_FINE),
    KVRecipe(
        name="kivi",
        summary="2 bits, keys per channel, values per token, groups of 32, the newest 32 exact",
        paper="Liu et al. 2024, arXiv 2402.02750 (values join the keys' groups, no window apart)",
        allocation="fixed",
        candidates=(
            replace(
                _ALL,
                key=replace(by_channel(2, 32), residual=32),
                value=replace(by_token(2, 32), residual=32),
            ),
        ),
    ),
    KVRecipe(
        name="zipcache",
        summary="4 bits for the 60 % most attended tokens, 2 for the others",
        paper="He et al. 2024, arXiv 2405.14256 (mean over all queries; keys in groups of 64)",
        allocation="fixed",
        candidates=(
            KVAction(
                keep=0.6,
                scorer=AccumulatedAttention(mean=True),
                key=K4,
                value=by_token(4, separable=True),
                losers="demote",
                low=Tier(key=K2, value=by_token(2, separable=True)),
            ),
        ),
    ),
    KVRecipe(
        name="mikv",
        summary="heavy hitters and recent tokens, a fifth, in 8 bits, the others in 2",
        paper="Yang et al. 2024, arXiv 2402.18096 (keys per channel, which no balancer changes)",
        allocation="fixed",
        candidates=(
            KVAction(
                keep=0.2,
                scorer=AccumulatedAttention(),
                recent_share=0.5,
                key=K8,
                value=V8,
                losers="demote",
                low=Tier(key=K2, value=V2_FINE),
            ),
        ),
    ),
    KVRecipe(
        name="kvtuner",
        summary="every layer its own bits of keys and of values, by measured damage",
        paper="Li et al. 2025, arXiv 2502.04420 (exactly solved; scales count as bits)",
        allocation="layers",
        candidates=(_ALL,),
        formats=tuple(Tier(key=k, value=v) for k in (K8, K4, K2) for v in (V8, V4, V2)),
    ),
)

# what checks that errors add up: of tokens and precisions chosen together, at measured shares
_CHECKED = (
    replace(_SNAPKV, keep=0.3, key=K4, value=V4),
    replace(_SHORT, keep=0.5, key=K2_FINE, value=V2),
    replace(_SNAPKV, keep=0.2, key=K8, value=V8, losers="demote", low=Tier(key=K2, value=V2)),
    replace(_UNLIKE, keep=0.4, key=K4, value=V4, losers="demote", low=Tier(key=K2_FINE, value=V2)),
)


def measured_precisions(
    recipes: Iterable[KVRecipe], model: LanguageSpec
) -> tuple[tuple[Precision, ...], tuple[Precision, ...]]:
    """Every precision of keys, and of values, that a recipe may give to this model.

    The coarsest of the planner's come last, as `KVProfile` wants it.  None at all for recipes
    without few bits, and where codes of 2 bits do not fill bytes.
    """
    tiers = []
    for recipe in recipes:
        tiers += [*recipe.formats, *(tier for pair in recipe.demotions for tier in pair)]
        for action in recipe.candidates:
            tiers += [Tier(key=action.key, value=action.value)]
            tiers += [action.low] if action.low is not None else []
    few = any(packed(tier.key) or packed(tier.value) for tier in tiers)
    if not few or model.key_width % 4 or model.value_width % 4:
        return (), ()
    found = []
    for own, last in (
        ([tier.key for tier in tiers], K2_FINE),
        ([tier.value for tier in tiers], V2),
    ):
        exactly = [replace(precision, residual=0) for precision in own if packed(precision)]
        found.append((*(p for p in dict.fromkeys(exactly) if p != last), last))
    return found[0], found[1]


def demoting(recipes: Iterable[KVRecipe], candidates: tuple[KVAction, ...]) -> tuple[int, ...]:
    """Indices of the candidates whose losers a recipe may demote."""
    found: list[KVAction] = []
    for recipe in recipes:
        found += _DEMOTING if recipe.demotions else ()
        found += [bare(action) for action in recipe.candidates if action.low is not None]
    return tuple(candidates.index(a) for a in dict.fromkeys(found) if a in candidates)


def joint_checks(candidates: tuple[KVAction, ...]) -> tuple[KVAction, ...]:
    """Whole actions, measured to see whether errors add up."""
    return tuple(action for action in _CHECKED if bare(action) in candidates)
