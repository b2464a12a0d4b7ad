"""Scores from the attention that the queries at hand pay to each token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from cacheplan.kernels.column_sums.dispatch import column_sums
from cacheplan.scorers.seen import Seen
from cacheplan.types import AccumulatedAttention, WindowAttention


def window_attention(scorer: WindowAttention, seen: Seen) -> Tensor:
    """Attention from the last `window` queries, pooled over neighbouring tokens.

    mean_i A[i, j] (SnapKV, arXiv 2404.14469), plus `variance` times Var_i A[i, j] (CAKE, arXiv
    2503.12491), over the group's query heads or over `heads` for all kv heads
    (CompressKV, arXiv 2508.02401); times |v_j|_1 if `value_norm` (VATP, arXiv 2406.12335).
    """
    B, K, S, _ = seen.key.shape
    window = min(scorer.window, seen.query.shape[2])
    if scorer.variance or scorer.heads:
        weights = window_weights(seen, window)  # [B, H, W, S]
        paid = weights.mean(2)
        if scorer.variance:
            paid = paid + scorer.variance * weights.var(2, correction=min(1, window - 1))
        if scorer.heads:
            paid = paid[:, list(scorer.heads)].mean(1, keepdim=True).expand(B, K, S)
        else:
            paid = paid.view(B, K, seen.group, S).mean(2)
    else:
        recent = seen.query[:, :, seen.query.shape[2] - window :]
        paid = column_sums(recent, seen.key, scale=seen.scale) / (window * seen.group)
    pool = max_pool1d if scorer.pooling == "max" else avg_pool1d
    # padding counts as zero mass, as in the published code
    paid = pool(paid, scorer.pool, stride=1, padding=scorer.pool // 2)
    return paid * seen.value.float().abs().sum(-1) if scorer.value_norm else paid


def window_weights(seen: Seen, window: int) -> Tensor:
    """Causal attention of the last `window` queries over all keys, float32 `[B, H, W, S]`."""
    S, T = seen.key.shape[2], seen.query.shape[2]
    rows = seen.query[:, :, T - window :].float()
    keys = seen.key.float().repeat_interleave(seen.group, 1)
    position = torch.arange(S, device=rows.device)
    logits = rows @ keys.transpose(-1, -2) * seen.scale
    return logits.masked_fill_(position > position[S - window :, None], float("-inf")).softmax(-1)


def accumulated_attention(scorer: AccumulatedAttention, seen: Seen) -> Tensor:
    """Column sums s_j = sum over i >= j of A[i, j]; `mean` divides by the rows that see j."""
    received = column_sums(seen.query, seen.key, scale=seen.scale)
    if not scorer.mean:
        return received
    S, T = seen.key.shape[2], seen.query.shape[2]
    rows = (S - torch.arange(S, device=seen.key.device)).clamp(max=T)
    return received / rows
