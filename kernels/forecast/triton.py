"""The weighted sum of features as one Triton kernel that reads every feature once.

Import this module only where Triton is installed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacheplan.kernels.forecast.naive import MOST, assert_alike, is_identity

BLOCK = 1024  # elements per program: one 16-byte load per thread and tensor of 16-bit numbers
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # rounds like the naive version
NARROW = 2**31  # elements that 32-bit indices reach


@triton.jit  # type: ignore[untyped-decorator]
def combine_kernel(  # type: ignore[no-untyped-def]  # Triton takes annotations for its own
    out,
    F0,
    F1,
    F2,
    F3,
    w0,
    w1,
    w2,
    w3,
    scale,
    shift,
    add,
    n,
    C,
    FEATURES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_ADD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of the n elements of `[..., C]`, in the naive version's order of operations."""
    start = tl.program_id(0)
    if WIDE:  # the last block ends beyond 32-bit indices
        start = start.to(tl.int64)
    at = start * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = tl.load(F0 + at, mask=inside).to(tl.float32) * w0
    if FEATURES > 1:
        total += tl.load(F1 + at, mask=inside).to(tl.float32) * w1
    if FEATURES > 2:
        total += tl.load(F2 + at, mask=inside).to(tl.float32) * w2
    if FEATURES > 3:
        total += tl.load(F3 + at, mask=inside).to(tl.float32) * w3
    if HAS_SCALE:
        total *= tl.load(scale + at % C, mask=inside).to(tl.float32)
    if HAS_SHIFT:
        total += tl.load(shift + at % C, mask=inside).to(tl.float32)
    if HAS_ADD:
        total += tl.load(add + at, mask=inside).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def combine(
    features: Sequence[Tensor],
    weights: Sequence[float],
    channel_scale: Tensor | None = None,
    channel_shift: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """As `naive.combine`, for float16, bfloat16 and float32; contiguous, without gradients.

    Weights are arguments of the kernel, so new ones compile nothing.
    """
    assert_alike(features, weights, channel_scale, channel_shift, add)
    assert features[0].dtype != torch.float64, "the kernel adds in float32"
    if is_identity(weights, channel_scale, channel_shift, add):
        return features[0]
    given = [feature.contiguous() for feature in features]
    scale, shift, extra = (
        None if tensor is None else tensor.contiguous()
        for tensor in (channel_scale, channel_shift, add)
    )
    out = torch.empty_like(given[0])
    n = out.numel()
    if n == 0:
        return out
    unused = MOST - len(given)  # pointers the kernel never follows
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # where Triton launches
        combine_kernel[(triton.cdiv(n, BLOCK),)](
            out,
            *given,
            *[given[0]] * unused,
            *map(float, weights),
            *[0.0] * unused,
            given[0] if scale is None else scale,
            given[0] if shift is None else shift,
            given[0] if extra is None else extra,
            n,
            out.shape[-1],
            FEATURES=len(given),
            HAS_SCALE=scale is not None,
            HAS_SHIFT=shift is not None,
            HAS_ADD=extra is not None,
            WIDE=n + BLOCK > NARROW,
            BLOCK=BLOCK,
            **OPTIONS,
        )
    return out
