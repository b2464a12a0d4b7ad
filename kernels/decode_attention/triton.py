"""Attention of one query per sequence over ragged, partly quantised rows: Triton, split along rows.

Import this module only where Triton is installed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacheplan.kernels.decode_attention.kernel import decode_kernel, merge_kernel
from cacheplan.kernels.decode_attention.segments import (
    Segment,
    Work,
    assert_fitting,
    channel_count,
)
from cacheplan.kernels.quantize.packed import Packed

TILE = 64  # tokens of one step of a program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
STAGES = 3  # tiles of keys and values on their way at a time
SHARED = 228 * 1024  # bytes of a Hopper multiprocessor
MERGE_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
LOG2E = math.log2(math.e)
MERGED = 16  # slots that the merger reads at a time
INTERPRETED = "Triton's interpreter cannot compute in bfloat16; pass compute=torch.float32"
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def decode_attention(
    query: Tensor,
    segments: Sequence[Segment],
    work: Work,
    *,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """As `naive.decode_attention`, for 16-bit or float32 queries, with the division of `divide`.

    Products take operands of `compute` and add in float32: by default the pool's own type, and
    float16 for packed pools.  Every tensor keeps its place and size between calls, so that a step
    can be captured in a CUDA graph; rows grow by writing to `lengths`.
    """
    assert_fitting(query, segments, sinks)
    B, H, _ = query.shape
    rows, DV = segments[0].lengths.shape[0], channel_count(segments[0].values)
    group = B * H // rows
    assert len(work.items) == len(segments), (len(work.items), len(segments))
    query = query.contiguous()
    partial = torch.empty(work.slots, group, DV, dtype=torch.float32, device=query.device)
    logsum = torch.empty(work.slots, group, dtype=torch.float32, device=query.device)
    out = torch.empty(B, H, DV, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]  # where Triton launches
        for segment, items in zip(segments, work.items, strict=True):
            if items.shape[0] == 0:
                continue
            keys, key_type, key_scale, key_zero = _pool(segment.keys, compute)
            values, value_type, value_scale, value_zero = _pool(segment.values, compute)
            assert query.is_cuda or torch.bfloat16 not in (key_type, value_type), INTERPRETED
            by = segment.values.channel_scale if isinstance(segment.values, Packed) else None
            decode_kernel[(items.shape[0],)](
                query,
                keys,
                query if key_scale is None else key_scale,
                query if key_zero is None else key_zero,
                values,
                query if value_scale is None else value_scale,
                query if value_zero is None else value_zero,
                query if by is None else by.contiguous(),
                query if segment.bias is None else segment.bias,
                segment.offsets,
                segment.lengths,
                items,
                partial,
                logsum,
                scale * LOG2E,
                (softcap or 0.0) * LOG2E,
                **constants(segment, group, key_type, value_type, softcap is not None),
                **OPTIONS,
                num_stages=stages(segment, _shared_memory(query.device)),
            )
        merge_kernel[(rows, group)](
            partial,
            logsum,
            work.ranges,
            query if sinks is None else sinks,
            out,
            rows // B,
            G=group,
            DV=DV,
            HAS_SINKS=sinks is not None,
            BLOCK_S=MERGED,
            BLOCK_V=triton.next_power_of_2(DV),
            **MERGE_OPTIONS,
        )
    return out


def constants(
    segment: Segment,
    group: int,
    key_type: torch.dtype,
    value_type: torch.dtype,
    softcap: bool = False,
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    keys, values = segment.keys, segment.values
    D, DV = channel_count(keys), channel_count(values)
    key_group, key_groups = _groups(keys)
    _, value_groups = _groups(values)
    tile = math.gcd(key_group, TILE) if key_group else TILE
    if tile < 16:
        raise ValueError(
            f"Keys in groups of {key_group} tokens cannot be decoded; take a multiple of 16."
        )
    wide = torch.float32 in (key_type, value_type)
    return {
        "G": group,
        "D": D,
        "DV": DV,
        "KEY_BITS": keys.format.bits if isinstance(keys, Packed) else 16,
        "KEY_CODES": isinstance(keys, Packed) and keys.zero is not None,
        "KEY_GROUP": key_group,
        "KEY_GROUPS": key_groups,
        "KEY_TYPE": TYPES[key_type],
        "VALUE_BITS": values.format.bits if isinstance(values, Packed) else 16,
        "VALUE_CODES": isinstance(values, Packed) and values.zero is not None,
        "VALUE_GROUPS": value_groups,
        "VALUE_TYPE": TYPES[value_type],
        "SEPARABLE": isinstance(values, Packed) and values.channel_scale is not None,
        "HAS_SOFTCAP": softcap,
        "HAS_BIAS": segment.bias is not None,
        "PRECISION": "ieee" if wide else "tf32",  # of float32 operands only
        "BLOCK_T": tile,
        "BLOCK_H": max(8, triton.next_power_of_2(group)),
        "BLOCK_K": max(16, triton.next_power_of_2(D // _planes(keys))),
        "BLOCK_V": max(16, triton.next_power_of_2(DV // _planes(values))),
    }


def stages(segment: Segment, memory: int = SHARED) -> int:
    """How many tiles are on their way at a time, in a multiprocessor with `memory` bytes."""
    pools = (segment.keys, segment.values)
    rows = [own.codes if isinstance(own, Packed) else own for own in pools]
    tile = TILE * sum(row.shape[1] * row.element_size() for row in rows)
    free = memory - 16 * 1024  # beside logits, weights and what the system takes
    return max(1, min(STAGES, 1 + free // tile))


@functools.cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return SHARED
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


def _pool(
    pool: Tensor | Packed, compute: torch.dtype | None
) -> tuple[Tensor, torch.dtype, Tensor | None, Tensor | None]:
    """Memory that the kernel reads, the type it computes with, scales and zeros."""
    if not isinstance(pool, Packed):
        assert pool.is_contiguous(), pool.stride()
        return pool, compute or pool.dtype, None, None
    for tensor in (pool.codes, pool.scale, pool.zero):
        assert tensor is None or tensor.is_contiguous(), tensor.stride()
    return pool.codes, compute or torch.float16, pool.scale, pool.zero


def _planes(pool: Tensor | Packed) -> int:
    return pool.format.planes if isinstance(pool, Packed) else 1


def _groups(pool: Tensor | Packed) -> tuple[int, int]:
    """Tokens per scale of a channel, or scales per token; 0 stands for none."""
    if not isinstance(pool, Packed):
        return 0, 0
    format, channels = pool.format, pool.channels
    if format.axis == "channel":
        assert format.group is not None
        return format.group, 0
    width, group = channels // format.planes, format.group or channels
    if not format.whole_planes(channels):
        raise ValueError(
            f"Groups of {group} among {channels} channels in {format.number} cannot be decoded; "
            f"take a multiple of {width} that divides {channels}, or all channels."
        )
    return 0, channels // group
