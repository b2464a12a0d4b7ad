"""The arithmetic of every scorer: how much each cached token deserves to stay.

A scorer function takes its settings, the queries `[B, H, T, D]` of the last T positions and the
keys `[B, K, S, D]`, both with positions already rotated in, and returns float32 `[B, K, S]`,
higher = keep.  None needs attention weights from the model, so any attention kernel may run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, normalize

from cacheplan.kernels.column_sums.naive import column_sums
from cacheplan.types import (
    AccumulatedAttention,
    KeyDifference,
    KeyNorm,
    Position,
    Random,
    Scorer,
    WindowAttention,
)


def position(scorer: Position, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Newest first."""
    order = torch.arange(key.shape[2], device=key.device, dtype=torch.float32)
    return order.expand(key.shape[:3])


def random(scorer: Random, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """A seeded order, the same for every batch entry."""
    generator = torch.Generator().manual_seed(scorer.seed)
    draw = torch.rand(key.shape[1:3], generator=generator)
    return draw.to(key.device).expand(key.shape[:3])


def key_norm(scorer: KeyNorm, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """-|k| (arXiv 2406.11430: keys of small norm receive more attention)."""
    return key.float().square().sum(-1).sqrt().neg()


def key_difference(scorer: KeyDifference, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """-cos(k_j, mean_i k_i / |k_i|) (KeyDiff, arXiv 2504.15364, section 3)."""
    direction = normalize(key.float(), dim=-1)
    return -(direction * normalize(direction.mean(2, keepdim=True), dim=-1)).sum(-1)


def window_attention(scorer: WindowAttention, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean attention from the last `window` queries, pooled (SnapKV, arXiv 2404.14469)."""
    window = min(scorer.window, query.shape[2])
    received = column_sums(query[:, :, query.shape[2] - window :], key, scale=scale)
    pool = max_pool1d if scorer.pooling == "max" else avg_pool1d
    group = query.shape[1] // key.shape[1]
    # padding counts as zero mass, as in the published code
    return pool(received / (window * group), scorer.pool, stride=1, padding=scorer.pool // 2)


def accumulated_attention(
    scorer: AccumulatedAttention, query: Tensor, key: Tensor, scale: float
) -> Tensor:
    """Column sums s_j = sum over i >= j of A[i, j]; `mean` divides by the rows that see j."""
    received = column_sums(query, key, scale=scale)
    if not scorer.mean:
        return received
    S, T = key.shape[2], query.shape[2]
    rows = (S - torch.arange(S, device=key.device)).clamp(max=T)
    return received / rows


SCORES: dict[type[Scorer], Callable[[Any, Tensor, Tensor, float], Tensor]] = {
    Position: position,
    Random: random,
    KeyNorm: key_norm,
    KeyDifference: key_difference,
    WindowAttention: window_attention,
    AccumulatedAttention: accumulated_attention,
}


def score(scorer: Scorer, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Score every token of `key`; see the module's docstring for shapes."""
    return SCORES[type(scorer)](scorer, query, key, scale)
