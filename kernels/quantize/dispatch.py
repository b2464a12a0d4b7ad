"""Quantisation by the fastest implementation that a device has."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from cacheplan.kernels.quantize import naive
from cacheplan.kernels.quantize.naive import dequantize
from cacheplan.kernels.quantize.packed import Format, Packed

__all__ = ["dequantize", "path", "quantize"]


def path(device: torch.device | str) -> Literal["triton", "naive"]:
    """The implementation that `quantize` takes: Triton needs CUDA and the triton package."""
    usable = torch.device(device).type == "cuda" and find_spec("triton") is not None
    return "triton" if usable else "naive"


def quantize(x: Tensor, format: Format, channel_scale: Tensor | None = None) -> Packed:
    """Quantise `[..., T, D]`; see `naive.quantize`.  What `path` names is what runs."""
    if path(x.device) == "naive" or x.numel() == 0:
        return naive.quantize(x, format, channel_scale)
    from cacheplan.kernels.quantize import triton

    return triton.quantize(x, format, channel_scale)
