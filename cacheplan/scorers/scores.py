"""The arithmetic of every scorer: how much each cached token deserves to stay.

A scorer function takes its settings and what can be `Seen` of one layer, and returns float32
`[B, K, S]`, higher = keep.  None needs attention weights from the model, so any attention kernel
may run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cacheplan.scorers.attention import accumulated_attention, window_attention
from cacheplan.scorers.expected import expected_attention
from cacheplan.scorers.lag import lag_difference
from cacheplan.scorers.probe import probe_attention
from cacheplan.scorers.seen import Rotary, Seen
from cacheplan.scorers.spectrum import low_pass_residual
from cacheplan.types import (
    AccumulatedAttention,
    ExpectedAttention,
    KeyDifference,
    KeyNorm,
    LagDifference,
    LowPassResidual,
    Position,
    ProbeAttention,
    Random,
    Scorer,
    WindowAttention,
)

__all__ = ["SCORES", "Rotary", "Seen", "score"]


def position(scorer: Position, seen: Seen) -> Tensor:
    """Newest first."""
    order = torch.arange(seen.key.shape[2], device=seen.key.device, dtype=torch.float32)
    return order.expand(seen.key.shape[:3])


def random(scorer: Random, seen: Seen) -> Tensor:
    """A seeded order, the same for every batch entry."""
    generator = torch.Generator().manual_seed(scorer.seed)
    draw = torch.rand(seen.key.shape[1:3], generator=generator)
    return draw.to(seen.key.device).expand(seen.key.shape[:3])


def key_norm(scorer: KeyNorm, seen: Seen) -> Tensor:
    """-|k| (arXiv 2406.11430: keys of small norm receive more attention)."""
    return seen.key.float().square().sum(-1).sqrt().neg()


def key_difference(scorer: KeyDifference, seen: Seen) -> Tensor:
    """-cos(k_j, mean_i k_i / |k_i|) (KeyDiff, arXiv 2504.15364, section 3)."""
    direction = normalize(seen.key.float(), dim=-1)
    return -(direction * normalize(direction.mean(2, keepdim=True), dim=-1)).sum(-1)


SCORES: dict[type[Scorer], Callable[[Any, Seen], Tensor]] = {
    Position: position,
    Random: random,
    KeyNorm: key_norm,
    KeyDifference: key_difference,
    WindowAttention: window_attention,
    AccumulatedAttention: accumulated_attention,
    ExpectedAttention: expected_attention,
    LagDifference: lag_difference,
    LowPassResidual: low_pass_residual,
    ProbeAttention: probe_attention,
}


def score(scorer: Scorer, seen: Seen) -> Tensor:
    """Score every token of `seen.key`, float32 `[B, K, S]`, higher = keep."""
    return SCORES[type(scorer)](scorer, seen)
