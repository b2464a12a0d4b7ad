"""Tokens against the stretch of text that follows them."""

from __future__ import annotations

import torch
from torch import Tensor

from cacheplan.scorers.seen import Seen
from cacheplan.types import LagDifference


def lag_difference(scorer: LagDifference, seen: Seen) -> Tensor:
    """Rank within each stretch, from 0 to 1; what has no full stretch behind it scores above 1.

    A token's score is the mean over key and value of softmax(std_d((x - min) / (max - min))), with
    the range of each channel taken over the next stretch (LagKV, arXiv 2504.04704).
    """
    B, K, S, _ = seen.key.shape
    lag, first = scorer.lag, min(scorer.skipped, S)
    stretches = max((S - first) // lag - 1, 0)  # that have a full stretch behind them
    ranks = torch.arange(S, device=seen.key.device).div(S).add(1).repeat(B, K, 1)  # newest last
    ranks[..., :first] = 2
    if stretches:
        parts = [_unevenness(x[:, :, first:], lag, stretches) for x in (seen.key, seen.value)]
        order = (parts[0] + parts[1]).argsort(dim=-1, stable=True)
        place = order.argsort(dim=-1) / lag
        ranks[..., first : first + stretches * lag] = place.flatten(2)
    return ranks


def _unevenness(x: Tensor, lag: int, stretches: int) -> Tensor:
    """`[B, K, stretches, lag]` of `x` `[B, K, >= (stretches + 1) * lag, D]`."""
    B, K, _, D = x.shape
    cut = x[:, :, : (stretches + 1) * lag].float().reshape(B, K, stretches + 1, lag, D)
    own, following = cut[:, :, :-1], cut[:, :, 1:]
    low, high = following.amin(3, keepdim=True), following.amax(3, keepdim=True)
    # a channel without a range of its own says nothing; it must not divide by zero
    relative = (own - low) / (high - low).clamp(min=1e-12)
    uneven: Tensor = relative.std(-1).softmax(-1)
    return uneven
