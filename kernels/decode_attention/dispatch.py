"""Attention of one query per sequence over ragged, partly packed rows, by the device's best way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from cacheplan.kernels.decode_attention import naive
from cacheplan.kernels.decode_attention.segments import Segment, Work


def path(device: torch.device | str) -> Literal["triton", "naive"]:
    """The implementation that `decode_attention` takes: Triton needs CUDA and its package."""
    usable = torch.device(device).type == "cuda" and find_spec("triton") is not None
    return "triton" if usable else "naive"


def decode_attention(
    query: Tensor,
    segments: Sequence[Segment],
    work: Callable[[], Work],
    *,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from `[B, H, D]`; see `naive.decode_attention`.  What `path` names is what runs.

    `work` gives the division of `segments.divide`, which only Triton needs.
    """
    if path(query.device) == "naive":
        return naive.decode_attention(query, segments, scale=scale, sinks=sinks)
    from cacheplan.kernels.decode_attention import triton

    return triton.decode_attention(query, segments, work(), scale=scale, sinks=sinks)
