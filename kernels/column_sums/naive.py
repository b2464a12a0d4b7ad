"""Column sums of causal attention without the attention matrix, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def column_sums(query: Tensor, key: Tensor, *, scale: float, block: int = 128) -> Tensor:
    """Sum the causal attention weights that each key receives, per kv head.

    `query` `[B, H, T, D]` holds the last T positions of the S in `key` `[B, K, S, D]`; the H / K
    query heads of a group are summed.  Returns float32 `[B, K, S]` whose sum over S is T * H / K.

    Query rows go through in blocks, so memory is `B * H * block * S`; softmax and sums are
    float32 whatever the inputs are.
    """
    B, H, T, D = query.shape
    K, S = key.shape[1], key.shape[2]
    grouped = query.reshape(B, K, H // K, T, D)
    transposed = key.float().transpose(-1, -2).unsqueeze(2)  # [B, K, 1, D, S]
    position = torch.arange(S, device=key.device)
    total = torch.zeros(B, K, S, dtype=torch.float32, device=key.device)
    for start in range(0, T, block):
        rows = grouped[:, :, :, start : start + block].float()
        end = S - T + start + rows.shape[3]  # no row of the block sees what follows
        own = position[end - rows.shape[3] : end]
        weights = (rows @ transposed[..., :end]) * scale  # [B, K, G, block, end]
        weights.masked_fill_(position[:end] > own[:, None], float("-inf"))
        total[..., :end] += weights.softmax(-1).sum((2, 3))
    return total
