"""Attention that probe tokens pay to a prompt they stand behind."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from cacheplan.errors import UnsupportedError
from cacheplan.scorers.seen import Seen
from cacheplan.types import ProbeAttention

_BLOCK = 128  # probe queries at a time: bounds the memory for attention weights


def probe_attention(scorer: ProbeAttention, seen: Seen) -> Tensor:
    """What the probe has found, pooled over neighbouring tokens."""
    if scorer not in seen.probed:
        raise UnsupportedError(
            "The scorer probe_attention needs tokens read behind the prompt: run the plan through "
            "`apply`."
        )
    found = seen.probed[scorer]
    return avg_pool1d(found, scorer.pool, stride=1, padding=scorer.pool // 2)


def paid(scorer: ProbeAttention, query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    """Attention from the T probe queries to the tokens before them, float32 `[B, K, S]`.

    `query` `[B, H, T, D]`; `key` `[B, K, S + T, D]` are those of the prompt and of the probe,
    whose tokens see the prompt and, causally, each other.
    """
    B, H, T, D = query.shape
    K, S = key.shape[1], key.shape[2] - T
    grouped = query.reshape(B, K, H // K, T, D)
    transposed = key.float().transpose(-1, -2)[:, :, None]  # [B, K, 1, D, S + T]
    position = torch.arange(S + T, device=key.device)
    total = torch.zeros(B, K, S, device=key.device)
    for start in range(0, T, _BLOCK):
        rows = grouped[:, :, :, start : start + _BLOCK].float()
        last = position[S + start : S + start + rows.shape[3], None]
        logits = (rows @ transposed * scale).masked_fill_(position > last, float("-inf"))
        weights = logits.softmax(-1)[..., :S]
        if scorer.reduce == "max":
            total = torch.maximum(total, weights.amax((2, 3)))
        else:
            total += weights.mean(2).sum(2)
    return total


def joined(scorer: ProbeAttention, earlier: Tensor | None, found: Tensor) -> Tensor:
    """What several pieces of one probe have found together."""
    if earlier is None:
        return found
    return torch.maximum(earlier, found) if scorer.reduce == "max" else earlier + found
