"""Attention of one query per sequence over ragged, partly packed rows, by the device's best way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cacheplan.kernels import paths
from cacheplan.kernels.decode_attention import naive, segments
from cacheplan.kernels.decode_attention.segments import Segment, Work


def path(query: Tensor, parts: Sequence[Segment]) -> paths.Name:
    """The implementation that `decode_attention` takes.

    Formats whose groups make no tiles, and tokens wider than 512 bytes, stay with torch.
    """
    fits = all(segments.has_tiles(part) for part in parts)
    return paths.choose(query.device, query.dtype).name if fits else "naive"


def decode_attention(
    query: Tensor,
    parts: Sequence[Segment],
    work: Callable[[], Work],
    *,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend from `[B, H, D]`; see `naive.decode_attention`.  What `path` names is what runs.

    `work` gives the division of `divide`, which only Triton needs.
    """
    if path(query, parts) == "naive":
        return naive.decode_attention(query, parts, scale=scale, sinks=sinks, softcap=softcap)
    from cacheplan.kernels.decode_attention import triton

    return triton.decode_attention(query, parts, work(), scale=scale, sinks=sinks, softcap=softcap)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors among which work is divided; 1 where there is no GPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
