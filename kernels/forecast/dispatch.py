"""The weighted sum of features by the fastest implementation that a device has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cacheplan.kernels import paths
from cacheplan.kernels.forecast import naive


def path(device: torch.device | str, dtype: torch.dtype = torch.float32) -> paths.Name:
    """The implementation that `combine` takes for features on this device and of this dtype."""
    return paths.choose(device, dtype).name


def combine(
    features: Sequence[Tensor],
    weights: Sequence[float],
    channel_scale: Tensor | None = None,
    channel_shift: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """`channel_scale * sum_i weights[i] * features[i] + channel_shift + add`; see `naive.combine`.

    What `path` names is what runs: an error of Triton is raised, never hidden by falling back.
    """
    if path(features[0].device, features[0].dtype) == "naive":
        return naive.combine(features, weights, channel_scale, channel_shift, add)
    from cacheplan.kernels.forecast import triton

    return triton.combine(features, weights, channel_scale, channel_shift, add)
