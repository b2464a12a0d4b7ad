"""Moving tokens between caches and pools of ragged rows in Triton; all in place.

Import this module only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacheplan.kernels.compact.naive import assert_appending, assert_gathering

TILE = 2048  # elements of one program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator]
def gather_kernel(  # type: ignore[no-untyped-def]  # Triton takes annotations for its own
    source,
    kept,
    ranges,
    pool,
    offsets,
    row_stride,
    token_stride,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_T of a row's kept tokens."""
    row = tl.program_id(1)
    first = tl.load(ranges + row)
    count = tl.load(ranges + row + 1) - first
    start = tl.program_id(0) * BLOCK_T
    if start >= count:
        return
    t = start + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_D)
    inside = t < count
    token = tl.load(kept + first + t, mask=inside, other=0).to(tl.int64)
    base = source + row.to(tl.int64) * row_stride
    both = inside[:, None] & (c < D)[None, :]
    found = tl.load(base + token[:, None] * token_stride + c[None, :], mask=both)
    target = tl.load(offsets + row).to(tl.int64) + t
    tl.store(pool + target[:, None] * D + c[None, :], found, mask=both)


@triton.jit  # type: ignore[untyped-decorator]
def append_kernel(  # type: ignore[no-untyped-def]
    keys,
    values,
    new_keys,
    new_values,
    offsets,
    lengths,
    T,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One new token of one row."""
    row, t = tl.program_id(0), tl.program_id(1)
    token = (tl.load(offsets + row) + tl.load(lengths + row) + t).to(tl.int64)
    new = row.to(tl.int64) * T + t
    c = tl.arange(0, BLOCK_D)
    key = tl.load(new_keys + new * D + c, mask=c < D)
    tl.store(keys + token * D + c, key, mask=c < D)
    d = tl.arange(0, BLOCK_V)
    value = tl.load(new_values + new * DV + d, mask=d < DV)
    tl.store(values + token * DV + d, value, mask=d < DV)


def gather(
    source: Tensor,
    kept: Tensor,
    ranges: Tensor,
    pool: Tensor,
    offsets: Tensor,
    *,
    longest: int | None = None,
) -> None:
    """As `naive.gather`.

    `longest`, the most tokens that a row keeps, spares programs without work; without it there is
    one for every block of the source.
    """
    assert_gathering(source, kept, ranges, pool, offsets)
    assert pool.is_contiguous(), pool.stride()
    rows, S, D = source.shape
    if source.stride(-1) != 1:
        source = source.contiguous()
    block_d = triton.next_power_of_2(D)
    block_t = max(1, TILE // block_d)
    blocks = triton.cdiv(S if longest is None else longest, block_t)
    if blocks * rows == 0 or kept.numel() == 0:
        return
    with torch.cuda.device_of(source):  # type: ignore[no-untyped-call]  # where Triton launches
        gather_kernel[(blocks, rows)](
            source,
            kept,
            ranges,
            pool,
            offsets,
            source.stride(0),
            source.stride(1),
            D=D,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            **OPTIONS,
        )


def append(
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    *,
    offsets: Tensor,
    lengths: Tensor,
) -> None:
    """As `naive.append`; without a word to the host, so fit for a CUDA graph."""
    assert_appending(keys, values, new_keys, new_values, offsets, lengths)
    assert keys.is_contiguous(), keys.stride()
    assert values.is_contiguous(), values.stride()
    rows, T, D = new_keys.shape
    DV = values.shape[1]
    if rows * T == 0:
        return
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]  # where Triton launches
        append_kernel[(rows, T)](
            keys,
            values,
            new_keys.contiguous(),
            new_values.contiguous(),
            offsets,
            lengths,
            T,
            D=D,
            DV=DV,
            BLOCK_D=triton.next_power_of_2(D),
            BLOCK_V=triton.next_power_of_2(DV),
            **OPTIONS,
        )
    lengths += T
