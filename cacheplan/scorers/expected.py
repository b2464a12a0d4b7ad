"""Attention that queries still to come are expected to pay."""

from __future__ import annotations

import torch
from torch import Tensor

from cacheplan.errors import UnsupportedError
from cacheplan.scorers.seen import Rotary, Seen
from cacheplan.types import ExpectedAttention


def expected_attention(scorer: ExpectedAttention, seen: Seen) -> Tensor:
    """E[exp(q.k)] over queries q ~ N(mu, Sigma), normalised over the tokens, times |v|_2.

    With mu and Sigma rotated by the mean rotation R of the next `future` positions,
    z_j = scale R mu . k_j + scale^2 / 2 k_j' R Sigma R' k_j, and softmax(z) is averaged over the
    group (arXiv 2510.00636).  The first `skipped` tokens score above all others.
    """
    if seen.rotary is None:
        raise UnsupportedError(
            "The scorer expected_attention needs the rotary frequencies of the layer: run the "
            "plan through `apply`, or solve with another recipe."
        )
    B, K, S, _ = seen.key.shape
    G = seen.group
    mean, covariance = _future_queries(scorer, seen, seen.rotary)
    keys = seen.key.float()[:, :, None]  # [B, K, 1, S, D]
    z = seen.scale * (keys @ mean.view(B, K, G, -1, 1))[..., 0]  # [B, K, G, S]
    if covariance is not None:
        D = keys.shape[-1]
        spread = ((keys @ covariance.view(B, K, G, D, D)) * keys).sum(-1)
        z = z + seen.scale**2 / 2 * spread
    first = min(scorer.skipped, S - 1)
    z[..., :first] = float("-inf")
    weighed: Tensor = (z.softmax(-1).mean(2) + scorer.epsilon) * seen.value.float().norm(dim=-1)
    weighed[..., :first] = weighed.amax(-1, keepdim=True) + 1
    return weighed


def _future_queries(
    scorer: ExpectedAttention, seen: Seen, rotary: Rotary
) -> tuple[Tensor, Tensor | None]:
    """Mean `[B, H, D]` and covariance `[B, H, D, D]` of the queries at the future positions."""
    T = seen.query.shape[2]
    skipped = min(max(scorer.skipped - seen.start, 0), T - 1)
    place = torch.arange(seen.start + skipped, seen.start + T, device=seen.query.device)
    angle = place[:, None] * rotary.frequencies  # [T, R]
    plain = turned(seen.query[:, :, skipped:].float(), angle.cos(), -angle.sin(), rotary)
    ahead = seen.start + T + torch.arange(scorer.future, device=place.device)
    angle = ahead[:, None] * rotary.frequencies
    cos, sin = angle.cos().mean(0), angle.sin().mean(0)
    mean = plain.mean(2)
    if not scorer.covariance:
        return turned(mean, cos, sin, rotary), None
    centred = plain - mean[:, :, None]
    covariance = centred.transpose(-1, -2) @ centred / centred.shape[2]
    half = turned(covariance, cos, sin, rotary).transpose(-1, -2)  # Sigma R', transposed
    return turned(mean, cos, sin, rotary), turned(half, cos, sin, rotary)


def turned(x: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary) -> Tensor:
    """Turn the channel pairs of `x` `[..., D]`; `cos` and `sin` `[R]` or `[T, R]`.

    Rotations are linear, so mean cosines and sines turn by the mean rotation.
    """
    first, second = rotary.pairs()
    out = x.clone()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out
