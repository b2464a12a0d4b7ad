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
    takes the maximum over 7.  A window of one query without pooling is TOVA's
    (arXiv 2401.06104).  Query heads of one kv head are averaged.

    `variance` times the variance over the window's queries is added to the mean (CAKE,
    arXiv 2503.12491).  `value_norm` multiplies by the L1 norm of the token's value (VATP,
    arXiv 2406.12335).  `heads` names the query heads of the layer whose mean ranks the tokens of
    all its kv heads (CompressKV, arXiv 2508.02401); empty means that each head ranks its own.
    """

    name: ClassVar[str] = "window_attention"
    window: int = 32
    pool: int = 5
    pooling: str = "average"  # or "max"
    variance: float = 0.0
    value_norm: bool = False
    heads: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention:
    """Attention expected from the next `future` queries, times the L2 norm of the value.

    Queries are taken as normally distributed before rotation, with the mean and (if `covariance`)
    the covariance of those read so far without the first `skipped`, whose keys do not compete
    either; rotations are averaged over the future positions.  `epsilon` is added to the
    attention before the norm weighs it.  Devoto et al. 2025, arXiv 2510.00636; settings and
    their defaults are those of the authors' code.
    """

    name: ClassVar[str] = "expected_attention"
    future: int = 512
    skipped: int = 4
    covariance: bool = True
    epsilon: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LagDifference:
    """Keys and values that stand out against the next `lag` tokens (LagKV, arXiv 2504.04704).

    Behind the first `skipped` tokens the text is cut into stretches of `lag`; within each, tokens
    are ranked by how unevenly their channels lie in the range of the following stretch, so that
    all stretches lose the same share.  The last stretch and what follows it stay.
    """

    name: ClassVar[str] = "lag_difference"
    lag: int = 128
    skipped: int = 4


@dataclass(frozen=True, kw_only=True)
class LowPassResidual:
    """Distance of key and value from their low-pass filtered course (FlashCache, arXiv 2511.16786).

    The lowest `passband` of the frequencies along the tokens (DCT-II) are the smooth course.
    """

    name: ClassVar[str] = "low_pass_residual"
    passband: float = 0.1


@dataclass(frozen=True, kw_only=True)
class AccumulatedAttention:
    """Column sums of the attention matrix, all queries of the prompt, summed over the group.

    `mean` divides each column by the number of queries that can see it, which takes away the
    advantage of old tokens; H2O (arXiv 2306.14048) and PrefixKV (arXiv 2412.03409) do not.
    """

    name: ClassVar[str] = "accumulated_attention"
    mean: bool = False


@dataclass(frozen=True, kw_only=True)
class ProbeAttention:
    """Attention from tokens that are read behind the prompt only to score it, and leave no trace.

    With `content` "filler" these are `tokens` queries at the positions where decoding will ask,
    whatever they say: `ids`, or the prompt's own last tokens once more (DapQ, arXiv 2603.11564).
    With "prompt" it is the prompt once more, in pieces of `tokens`, each behind `ids` as an
    instruction to repeat it (KVzip, arXiv 2505.23416).

    `reduce` says whether a token's score is the "sum" of what it receives from all probe
    queries, averaged over the group, or the "max" over both; neighbouring tokens are then averaged
    over `pool`.
    """

    name: ClassVar[str] = "probe_attention"
    content: str = "filler"  # or "prompt"
    tokens: int = 32
    ids: tuple[int, ...] = ()
    reduce: str = "sum"  # or "max"
    pool: int = 1


Scorer = (
    Position
    | Random
    | KeyNorm
    | KeyDifference
    | WindowAttention
    | AccumulatedAttention
    | ExpectedAttention
    | LagDifference
    | LowPassResidual
    | ProbeAttention
)

SCORERS: dict[str, type[Scorer]] = {
    cls.name: cls
    for cls in (
        Position,
        Random,
        KeyNorm,
        KeyDifference,
        WindowAttention,
        AccumulatedAttention,
        ExpectedAttention,
        LagDifference,
        LowPassResidual,
        ProbeAttention,
    )
}


def needs_prompt(scorer: Scorer) -> bool:
    """Whether the scorer looks at several queries or the whole course of a text.

    Such a scorer can rank tokens right after the prompt only, not while decoding, when the
    queries of one step and the tokens left by earlier evictions are all there is.
    """
    if isinstance(scorer, WindowAttention):
        return scorer.window > 1
    return isinstance(scorer, ExpectedAttention | LowPassResidual | ProbeAttention)


def needs_rotary(scorer: Scorer) -> bool:
    """Whether the scorer undoes the rotation of queries, so that it must know the frequencies."""
    return isinstance(scorer, ExpectedAttention)
