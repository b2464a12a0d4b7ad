"""Keys and values in few bits: which tokens they are for, and their bytes.

The newest tokens stay as they are ("exact"); older ones are packed, in whole groups where tokens
share scales.  Tokens that are generated join the exact ones and are packed `flush` at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cacheplan.types import KVAction, Precision, Tier

BLOCK = 64  # tokens by which storage of exact ones grows, and the least that are packed together


@dataclass(frozen=True)
class Tokens:
    """How many tokens of a row are stored in the action's precision, in its low tier, exactly."""

    high: int
    low: int
    exact: int


INT8_TOKENS = 256  # whole numbers of them go into torch's int8 product for CPUs


def for_int8_product(tier: Tier) -> bool:
    """Whether a CPU reads this tier without unpacking it.

    Keys in int8 with a scale per token, and values in int8 with one per channel of all tokens that
    are packed together: symmetric, with bfloat16 scales.
    """
    key, value = tier.key, tier.value
    return (
        (key.format, key.bits, key.axis, key.group) == ("int", 8, "token", None)
        and (value.format, value.bits, value.axis) == ("int", 8, "channel")
        and value.group == INT8_TOKENS
    )


def packed(precision: Precision) -> bool:
    return precision.format != "model"


def high_tier(action: KVAction) -> Tier | None:
    """The precision of tokens that stay, None if they are stored as they are."""
    if packed(action.key) or packed(action.value):
        return Tier(key=action.key, value=action.value)
    return None


def in_few_bits(action: KVAction) -> bool:
    return high_tier(action) is not None or action.low is not None


def bare(action: KVAction) -> KVAction:
    """The same choice of tokens in numbers as they are, its `keep` open."""
    if not in_few_bits(action):
        return replace(action, keep=1.0)
    losers = "evict" if action.losers == "demote" else action.losers
    plain = Precision()
    return replace(action, keep=1.0, key=plain, value=plain, losers=losers, low=None)


def group_tokens(tier: Tier) -> int:
    """Tokens that share scales, and so are packed together."""
    if for_int8_product(tier):
        return INT8_TOKENS
    by_channel = packed(tier.key) and tier.key.axis == "channel"
    return tier.key.group or 1 if by_channel else 1


def flush_tokens(action: KVAction) -> int | None:
    """How many generated tokens are packed at a time; None if they never are."""
    high = high_tier(action)
    return None if high is None else math.lcm(BLOCK, group_tokens(high))


def divide(action: KVAction, kept: int, losers: int) -> Tokens:
    """Where the tokens of a row go: `kept` stay, and `losers` do not.

    Exact are at least the newest `residual` tokens, and those that fill no group.
    """
    high, low, tiers = high_tier(action), action.low, []
    high_tokens = low_tokens = 0
    if high is not None:
        tiers.append(high)
    if low is not None:
        tiers.append(low)
        low_tokens = losers - losers % group_tokens(low)
    residual = max((p.residual for tier in tiers for p in (tier.key, tier.value)), default=0)
    if high is not None:
        older = max(0, kept - residual)
        high_tokens = older - older % group_tokens(high)
    stored = kept + losers if low is not None else kept
    return Tokens(high_tokens, low_tokens, stored - high_tokens - low_tokens)


def tier_bytes(tier: Tier, tokens: int, widths: tuple[int, int], element_size: int) -> int:
    """Bytes of one row's tokens: codes, scales and zeros; `widths` are those of key and value."""
    return _bytes(tier.key, tokens, widths[0], element_size) + _bytes(
        tier.value, tokens, widths[1], element_size
    )


def row_storage(
    action: KVAction,
    kept: int,
    losers: int,
    widths: tuple[int, int],
    element_size: int,
    generated: int = 0,
    flushed: int | None = None,
) -> int:
    """Bytes allocated for one row of a head, `generated` tokens after the prompt.

    Of these `flushed` have been packed; None: as many as if they came one by one.
    """
    tokens, high, flush = divide(action, kept, losers), high_tier(action), flush_tokens(action)
    if flushed is None:
        flushed = 0 if flush is None else max(0, generated - 1) // flush * flush
    capacity = tokens.exact + BLOCK * -(-(generated - flushed) // BLOCK)
    total = capacity * sum(widths) * element_size
    if high is not None and for_int8_product(high):
        stored, parts = tokens.high + flushed, (tokens.high > 0) + flushed // INT8_TOKENS
        total += stored * (sum(widths) + 2) + 2 * widths[1] * parts
    elif high is not None:
        total += tier_bytes(high, tokens.high + flushed, widths, element_size)
    if action.low is not None:
        total += tier_bytes(action.low, tokens.low, widths, element_size)
    return total


def _bytes(precision: Precision, tokens: int, width: int, element_size: int) -> int:
    """Codes, float16 scales and zeros, and the channels' scales of separable numbers."""
    if precision.format == "model":
        return tokens * width * element_size
    codes = tokens * width * precision.bits // 8
    if precision.format == "float":
        return codes + 2 * tokens
    if precision.axis == "channel":
        return codes + 4 * -(-tokens // (precision.group or 1)) * width
    groups = 1 if precision.group is None else -(-width // precision.group)
    return codes + 4 * tokens * groups + 2 * width * precision.separable
