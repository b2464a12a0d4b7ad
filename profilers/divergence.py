"""Divergence of next-token distributions."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """Mean over tokens of KL(reference || other) in nats, `[B]` float64.

    `reference` `[1, T, V]` and `other` `[B, T, V]` are logits.  float32 log-probabilities, summed
    in float64; tiny negative results of rounding are cut to zero.
    """
    p = torch.log_softmax(reference.float(), -1)
    q = torch.log_softmax(other.float(), -1)
    return (p.exp() * (p - q)).double().sum(-1).mean(-1).clamp(min=0.0)
