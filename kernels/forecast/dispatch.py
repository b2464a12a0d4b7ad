"""The weighted sum of features by the fastest implementation that a device has."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from cacheplan.kernels.forecast import naive

FUSED = (torch.float16, torch.bfloat16, torch.float32)  # what the Triton kernel computes


def path(
    device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Literal["triton", "naive"]:
    """The implementation that `combine` takes for features on this device and of this dtype.

    Triton needs CUDA and the triton package; float64 stays with torch.
    """
    if torch.device(device).type != "cuda" or dtype not in FUSED:
        return "naive"
    return "naive" if find_spec("triton") is None else "triton"


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
