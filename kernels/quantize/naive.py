"""Quantisation of keys and values to packed codes, in plain torch.

A zero is the minimum rounded down to float16, and scales are rounded up, so that no number of a
group lies outside its codes: the error is at most half a scale.  Arithmetic is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cacheplan.kernels.quantize.packed import (
    FP8_MOST,
    REFUSED,
    Format,
    Packed,
    assert_quantizable,
    channel_scales,
)

TINY = 2.0**-24  # the smallest positive float16
MOST = 65504.0  # the largest


def quantize(x: Tensor, format: Format, channel_scale: Tensor | None = None) -> Packed:
    """Quantise `[..., T, D]` in float16, bfloat16 or float32.

    `channel_scale` (float16 `[..., D]`) are the channels' scales of a separable format when they
    were fixed before; otherwise they are computed.  Raises ValueError for NaN and for tokens that
    are no full groups: whoever has them keeps them in 16 bits, and quantises every token once.
    """
    assert_quantizable(x, format, channel_scale)
    _assert_within(x)
    if format.separable and channel_scale is None:
        channel_scale = channel_scales(x)
    x = x.float()
    if channel_scale is not None:
        x = x / channel_scale.float().unsqueeze(-2)
        _assert_within(x)
    if format.number == "fp8":
        scale = _up(x.abs().amax(-1, keepdim=True) / FP8_MOST)
        codes = (x / scale.float()).to(torch.float8_e4m3fn).view(torch.uint8)
        return Packed(codes, scale, None, None, format)
    low, high = _extremes(x, format)
    zero = _down(low)
    scale = _up((high - zero.float()) / format.levels)
    spread_zero, spread_scale = (_spread(t, x.shape, format).float() for t in (zero, scale))
    codes = ((x - spread_zero) / spread_scale).round().clamp(0, format.levels).to(torch.uint8)
    return Packed(_packed(codes, format), scale, zero, channel_scale, format)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers `[..., T, D]`; computed in float64 if `dtype` is, otherwise in float32."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    shape = torch.Size((*packed.codes.shape[:-1], packed.channels))
    if packed.zero is None:
        x = packed.codes.view(torch.float8_e4m3fn).to(exact) * packed.scale.to(exact)
    else:
        scale, zero = (
            _spread(t, shape, packed.format).to(exact) for t in (packed.scale, packed.zero)
        )
        x = _unpacked(packed.codes, packed.format).to(exact) * scale + zero
    if packed.channel_scale is not None:
        x = x * packed.channel_scale.to(exact).unsqueeze(-2)
    return x.to(dtype)


def _assert_within(x: Tensor) -> None:
    if not (x.abs() <= MOST).all():
        raise ValueError(REFUSED)


def _extremes(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    if format.axis == "channel":
        assert format.group is not None
        *rows, T, D = x.shape
        grouped = x.reshape(*rows, T // format.group, format.group, D)
        return grouped.amin(-2), grouped.amax(-2)
    groups = torch.split(x, format.group or x.shape[-1], -1)  # the last may be narrower
    lows, highs = [group.amin(-1) for group in groups], [group.amax(-1) for group in groups]
    return torch.stack(lows, -1), torch.stack(highs, -1)


def _spread(numbers: Tensor, shape: torch.Size, format: Format) -> Tensor:
    """One number per group as one per element."""
    if format.axis == "channel":
        assert format.group is not None
        return numbers.repeat_interleave(format.group, -2)
    return numbers.repeat_interleave(format.group or shape[-1], -1)[..., : shape[-1]]


def _down(x: Tensor) -> Tensor:
    """The largest float16 not above `x`; neighbours of a float16 are neighbours as integers."""
    near = x.half()
    bits = near.view(torch.int16)
    below = torch.where(near > 0, bits - 1, torch.where(near < 0, bits + 1, -32767))
    return torch.where(near.float() > x, below.view(torch.float16), near)


def _up(x: Tensor) -> Tensor:
    """The smallest positive float16 not below `x`, which is not negative."""
    near = x.half()
    above = (near.view(torch.int16) + 1).view(torch.float16)
    return torch.where(near.float() < x, above, near).clamp(min=TINY)


def _packed(codes: Tensor, format: Format) -> Tensor:
    first, *others = codes.chunk(format.planes, -1)
    whole = first.clone()
    for index, plane in enumerate(others, 1):
        whole |= plane << (index * format.bits)
    return whole


def _unpacked(codes: Tensor, format: Format) -> Tensor:
    planes = [codes >> (index * format.bits) & format.levels for index in range(format.planes)]
    return torch.cat(planes, -1)
