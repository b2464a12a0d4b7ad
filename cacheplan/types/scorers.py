"""Token scorers as data: which number decides what stays in a KV cache (higher = keep).

The arithmetic is in `cacheplan.scorers`; these values travel in plans and profiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Position:
    """Newest tokens first: with sinks this is StreamingLLM's window (arXiv 2309.17453)."""

    name: ClassVar[str] = "position"


@dataclass(frozen=True, kw_only=True)
class Random:
    """A seeded random order: the floor every method must beat."""

    name: ClassVar[str] = "random"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class KeyNorm:
    """Keys of small L2 norm first (arXiv 2406.11430)."""

    name: ClassVar[str] = "key_norm"


@dataclass(frozen=True, kw_only=True)
class KeyDifference:
    """Keys least similar to the mean key direction first (KeyDiff, arXiv 2504.15364)."""

    name: ClassVar[str] = "key_difference"


@dataclass(frozen=True, kw_only=True)
class WindowAttention:
    """Attention mass from the last `window` prompt queries, pooled over neighbouring tokens.

    SnapKV (arXiv 2404.14469): window 32, average pooling over 5.  AdaKV (arXiv 2407.11550)
    takes the maximum over 7.  Query heads of one kv head are averaged.
    """

    name: ClassVar[str] = "window_attention"
    window: int = 32
    pool: int = 5
    pooling: str = "average"  # or "max"


@dataclass(frozen=True, kw_only=True)
class AccumulatedAttention:
    """Column sums of the attention matrix, all queries of the prompt, summed over the group.

    `mean` divides each column by the number of queries that can see it, which takes away the
    advantage of old tokens; H2O (arXiv 2306.14048) and PrefixKV (arXiv 2412.03409) do not.
    """

    name: ClassVar[str] = "accumulated_attention"
    mean: bool = False


Scorer = Position | Random | KeyNorm | KeyDifference | WindowAttention | AccumulatedAttention

SCORERS: dict[str, type[Scorer]] = {
    cls.name: cls
    for cls in (Position, Random, KeyNorm, KeyDifference, WindowAttention, AccumulatedAttention)
}
