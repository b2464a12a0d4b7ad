"""Quantisation to packed codes as one Triton kernel, with the codes of the naive version.

Import this module only where Triton is installed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacheplan.kernels.quantize.packed import (
    REFUSED,
    Format,
    Packed,
    assert_quantizable,
    channel_scales,
)

TILE = 1024  # elements of one program: more would spill, as divisions are long
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # rounds like the naive version


@triton.jit
def down(x):  # type: ignore[no-untyped-def]  # Triton takes annotations for its own
    """The largest float16 not above x."""
    near = x.to(tl.float16)
    bits = near.to(tl.int16, bitcast=True)
    below = tl.where(near > 0, bits - 1, tl.where(near < 0, bits + 1, -32767)).to(tl.int16)
    return tl.where(near.to(tl.float32) > x, below, bits).to(tl.float16, bitcast=True)


@triton.jit
def up(x):  # type: ignore[no-untyped-def]
    """The smallest positive float16 not below x, which is not negative."""
    near = x.to(tl.float16)
    bits = near.to(tl.int16, bitcast=True)
    bits = tl.where(near.to(tl.float32) < x, bits + 1, bits)
    return tl.maximum(bits, 1).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def rounded(x):  # type: ignore[no-untyped-def]
    """Half to even, for 0 <= x < 2**22: float32 has no fraction left beyond 2**23."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def e4m3(x):  # type: ignore[no-untyped-def]
    """The byte of x, |x| <= 448, half to even: hardware casts and the interpreter's differ."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = rounded(size.to(tl.float32, bitcast=True) * 512.0).to(tl.int32)
    code = tl.where(size < (121 << 23), subnormal, normal)  # below 2**-6
    return code | ((bits >> 24) & 0x80)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_kernel(  # type: ignore[no-untyped-def]
    x,
    channel_scale,
    codes,
    scale,
    zero,
    refused,
    tokens,
    row_tokens,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    FP8: tl.constexpr,
    SEPARABLE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """STEP of the tokens of x `[tokens, D]`: one group per channel, or whole tokens."""
    W: tl.constexpr = D // PLANES
    across: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    block = tl.program_id(0) // across  # neighbours share the memory sectors of tokens
    t = tl.arange(0, BLOCK_T)
    token = block.to(tl.int64) * STEP + t
    plane = tl.arange(0, PLANES)
    c = tl.program_id(0) % across * BLOCK_W + tl.arange(0, BLOCK_W)
    channel = plane[:, None] * W + c[None, :]  # [PLANES, BLOCK_W]
    whole = (t < STEP) & (token < tokens)
    inside = whole[:, None, None] & (c < W)[None, None, :]
    at = token[:, None, None] * D + channel[None]
    numbers = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    fine = tl.abs(numbers) <= 65504.0
    if SEPARABLE:
        divide = (token // row_tokens)[:, None, None] * D + channel[None]
        divisor = tl.load(channel_scale + divide, mask=inside, other=1.0).to(tl.float32)
        numbers = tl.div_rn(tl.where(fine, numbers, 0.0), divisor)
        fine = fine & (tl.abs(numbers) <= 65504.0)
    every = tl.min(fine.to(tl.int32).reshape(BLOCK_T * PLANES * BLOCK_W), 0)
    tl.store(refused, 1, mask=every == 0)
    numbers = tl.where(fine, numbers, 0.0)
    target = token[:, None] * W + c[None, :]
    kept = whole[:, None] & (c < W)[None, :]
    if FP8:
        most = tl.max(tl.max(tl.abs(numbers), 2), 1)
        one = up(tl.div_rn(most, 448.0))  # [BLOCK_T]
        tl.store(scale + token, one, mask=whole)
        found = e4m3(tl.div_rn(numbers, one.to(tl.float32)[:, None, None]))
        tl.store(codes + target, tl.sum(found, 1).to(tl.uint8), mask=kept)
    else:
        levels: tl.constexpr = 2**BITS - 1
        lows = tl.where(inside, numbers, float("inf"))
        highs = tl.where(inside, numbers, float("-inf"))
        if PER_CHANNEL:
            low = tl.min(lows, 0)  # [PLANES, BLOCK_W]
            high = tl.max(highs, 0)
            own = (c < W)[None, :] & (plane < PLANES)[:, None]
            place = block.to(tl.int64) * D + channel
        else:
            low = tl.min(tl.min(lows, 2).reshape(BLOCK_T, GROUPS, PLANES // GROUPS), 2)
            high = tl.max(tl.max(highs, 2).reshape(BLOCK_T, GROUPS, PLANES // GROUPS), 2)
            group = tl.arange(0, GROUPS)[None, :]
            own = whole[:, None] & (group < GROUPS)
            place = token[:, None] * GROUPS + group
        low = tl.where(own, low, 0.0)
        high = tl.where(own, high, 0.0)
        base = down(low)
        step = up(tl.div_rn(high - base.to(tl.float32), levels * 1.0))
        tl.store(zero + place, base, mask=own)
        tl.store(scale + place, step, mask=own)
        start, width = base.to(tl.float32), step.to(tl.float32)
        if PER_CHANNEL:
            start, width = start[None], width[None]
        else:
            shape: tl.constexpr = (BLOCK_T, GROUPS, PLANES // GROUPS)
            start = tl.broadcast_to(start[:, :, None], shape).reshape(BLOCK_T, PLANES, 1)
            width = tl.broadcast_to(width[:, :, None], shape).reshape(BLOCK_T, PLANES, 1)
        found = rounded(tl.maximum(tl.div_rn(numbers - start, width), 0.0))
        found = tl.minimum(found, levels * 1.0).to(tl.int32) << (plane * BITS)[None, :, None]
        tl.store(codes + target, tl.sum(found, 1).to(tl.uint8), mask=kept)


def quantize(
    x: Tensor, format: Format, channel_scale: Tensor | None = None, *, check: bool = True
) -> Packed:
    """As `naive.quantize`; groups of channels must be whole planes of the packed bytes.

    `check` reads a flag back from the device; without it, as in a CUDA graph, the caller vouches
    that all numbers are finite.
    """
    assert_quantizable(x, format, channel_scale)
    *rows, T, D = x.shape
    fixed = constants(format, D)
    if format.separable and channel_scale is None:
        channel_scale = channel_scales(x)
    tokens = x.numel() // D
    x = x.contiguous()
    shape = (*rows, T // fixed["STEP"], D) if fixed["PER_CHANNEL"] else (*rows, T, fixed["GROUPS"])
    scale = torch.empty(shape, dtype=torch.float16, device=x.device)
    zero = None if format.number == "fp8" else torch.empty_like(scale)
    codes = torch.empty(*rows, T, D // format.planes, dtype=torch.uint8, device=x.device)
    refused = torch.zeros(1, dtype=torch.int32, device=x.device)
    if tokens == 0:
        return Packed(codes, scale, zero, channel_scale, format)
    programs = triton.cdiv(tokens, fixed["STEP"])
    programs *= triton.cdiv(D // format.planes, fixed["BLOCK_W"])
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # where Triton launches
        quantize_kernel[(programs,)](
            x,
            x if channel_scale is None else channel_scale.contiguous(),
            codes,
            scale,
            scale if zero is None else zero,
            refused,
            tokens,
            T,
            **fixed,
            **OPTIONS,
        )
    if check and refused.item():
        raise ValueError(REFUSED)
    return Packed(codes, scale, zero, channel_scale, format)


def constants(format: Format, D: int) -> dict[str, Any]:
    """What the kernel is compiled for."""
    planes, width = format.planes, D // format.planes
    group = format.group or D
    per_channel = format.axis == "channel"
    if not format.whole_planes(D):
        raise ValueError(
            f"The kernel has no groups of {group} among {D} channels in {format.number}; "
            f"take a multiple of {width} that divides {D}, or all channels."
        )
    if per_channel:
        step, block_t = group, triton.next_power_of_2(group)
        block_w = min(triton.next_power_of_2(width), max(8, TILE // (block_t * planes)))
    else:
        block_w = triton.next_power_of_2(width)
        step = block_t = max(1, TILE // (block_w * planes))
    return {
        "D": D,
        "GROUPS": 1 if per_channel else D // group,
        "BITS": format.bits,
        "PLANES": planes,
        "PER_CHANNEL": per_channel,
        "FP8": format.number == "fp8",
        "SEPARABLE": format.separable,
        "STEP": step,
        "BLOCK_T": block_t,
        "BLOCK_W": block_w,
    }
