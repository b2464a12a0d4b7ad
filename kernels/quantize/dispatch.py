"""Quantisation by the fastest implementation that a device has."""

from __future__ import annotations

import torch
from torch import Tensor

from cacheplan.kernels import paths
from cacheplan.kernels.quantize import naive
from cacheplan.kernels.quantize.naive import dequantize
from cacheplan.kernels.quantize.packed import Format, Packed

__all__ = ["dequantize", "path", "quantize"]


def path(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    format: Format | None = None,
    channels: int = 0,
) -> paths.Name:
    """The implementation that `quantize` takes; groups within a plane of bytes stay with torch."""
    fits = format is None or format.whole_planes(channels)
    return paths.choose(device, dtype).name if fits else "naive"


def quantize(x: Tensor, format: Format, channel_scale: Tensor | None = None) -> Packed:
    """Quantise `[..., T, D]`; see `naive.quantize`.  What `path` names is what runs."""
    if x.numel() == 0 or path(x.device, x.dtype, format, x.shape[-1]) == "naive":
        return naive.quantize(x, format, channel_scale)
    from cacheplan.kernels.quantize import triton

    return triton.quantize(x, format, channel_scale)
