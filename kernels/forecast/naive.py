"""A weighted sum of features with an affine map per channel, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 4  # features that one call takes


def combine(
    features: Sequence[Tensor],
    weights: Sequence[float],
    channel_scale: Tensor | None = None,
    channel_shift: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """`channel_scale * sum_i weights[i] * features[i] + channel_shift + add`.

    `features` are 1 to 4 of one shape `[..., C]` and dtype, `channel_scale` and `channel_shift`
    `[C]`, `add` has the features' shape; those three in any floating dtype.  Float64 features are
    computed in float64, all others in float32, and the result is rounded once to their dtype.

    A single feature of weight 1 and nothing else is returned itself: the same bits, and the same
    memory, so the caller must not write to the result.
    """
    assert_alike(features, weights, channel_scale, channel_shift, add)
    if is_identity(weights, channel_scale, channel_shift, add):
        return features[0]
    exact = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    total = features[0].to(exact) * weights[0]
    for feature, weight in zip(features[1:], weights[1:], strict=True):
        total = total + feature.to(exact) * weight
    if channel_scale is not None:
        total = total * channel_scale.to(exact)
    if channel_shift is not None:
        total = total + channel_shift.to(exact)
    if add is not None:
        total = total + add.to(exact)
    return total.to(features[0].dtype)


def is_identity(
    weights: Sequence[float],
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    add: Tensor | None,
) -> bool:
    """Whether the result is the only feature itself."""
    one = len(weights) == 1 and weights[0] == 1
    return one and channel_scale is None and channel_shift is None and add is None


def assert_alike(
    features: Sequence[Tensor],
    weights: Sequence[float],
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    add: Tensor | None,
) -> None:
    """What every implementation relies on."""
    first = features[0]
    assert 1 <= len(features) == len(weights) <= MOST, (len(features), len(weights))
    assert first.is_floating_point(), first.dtype
    assert first.dim() > 0
    for feature in features[1:]:
        assert feature.shape == first.shape, (feature.shape, first.shape)
        assert feature.dtype == first.dtype, (feature.dtype, first.dtype)
    for channels in (channel_scale, channel_shift):
        assert channels is None or channels.shape == first.shape[-1:], first.shape
    assert add is None or add.shape == first.shape, first.shape
    others = (*features[1:], channel_scale, channel_shift, add)
    assert all(other is None or other.device == first.device for other in others), first.device
