"""Formats of quantised keys and values, and the tensors that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Number = Literal["int8", "int4", "int2", "fp8"]
BITS: dict[Number, int] = {"int8": 8, "int4": 4, "int2": 2, "fp8": 8}
FP8_MOST = 448.0  # largest number of e4m3


@dataclass(frozen=True)
class Format:
    """How floating-point keys or values `[..., T, D]` become codes.

    `axis` "channel" (keys; KIVI, section 3): one scale and zero per channel and `group` tokens.
    `axis` "token" (values): one per token and `group` channels; None takes all channels.
    `separable` (ZipCache, section 4.2) first divides every channel by `sqrt(max_t |x|)`.
    "fp8" is e4m3 with one scale per token and no zero.
    """

    number: Number
    axis: Literal["channel", "token"]
    group: int | None = None
    separable: bool = False

    def __post_init__(self) -> None:
        if self.number not in BITS or self.axis not in ("channel", "token"):
            raise ValueError(f"There is no format {self.number!r} along {self.axis!r}.")
        if self.group is not None and self.group < 1:
            raise ValueError(f"A group of {self.group} is empty; take at least 1.")
        if self.axis == "channel" and self.group is None:
            raise ValueError("Scales per channel need a group, a number of tokens.")
        if self.axis == "channel" and (self.separable or self.number == "fp8"):
            raise ValueError("Separable scales and fp8 are per token; take axis 'token'.")
        if self.number == "fp8" and (self.group is not None or self.separable):
            raise ValueError("fp8 has one scale per token; leave group and separable out.")
        if self.separable and self.group is not None:
            raise ValueError("Separable scales replace groups of channels; leave group out.")

    @property
    def bits(self) -> int:
        return BITS[self.number]

    @property
    def planes(self) -> int:
        """Channels per byte: byte c holds channels c, c + W, c + 2W, … for W = D / planes."""
        return 8 // self.bits

    @property
    def levels(self) -> int:
        """The largest code of an integer format."""
        return (1 << self.bits) - 1

    def whole_planes(self, channels: int) -> bool:
        """Whether a plane of bytes has one scale per token, as the Triton kernels take it."""
        if self.axis == "channel":
            return True
        group = self.group or channels
        return channels % group == 0 and group % (channels // self.planes) == 0

    def nbytes(self, tokens: int, channels: int) -> int:
        """Bytes of `tokens` of one row: codes, float16 scales and zeros, channels' scales."""
        codes = tokens * channels * self.bits // 8
        if self.number == "fp8":
            return codes + 2 * tokens
        if self.axis == "channel":
            assert self.group is not None
            return codes + 4 * -(-tokens // self.group) * channels
        groups = 1 if self.group is None else -(-channels // self.group)
        return codes + 4 * tokens * groups + 2 * channels * self.separable


@dataclass(frozen=True, eq=False)
class Packed:
    """Quantised `[..., T, D]`.

    `codes` uint8 `[..., T, D / planes]`; `scale` and `zero` (None for fp8) float16, and
    `[..., T / group, D]` per channel or `[..., T, groups]` per token; `channel_scale` float16
    `[..., D]`, None unless separable.  A number is `(code * scale + zero) * channel_scale`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    channel_scale: Tensor | None
    format: Format

    @property
    def channels(self) -> int:
        return self.codes.shape[-1] * self.format.planes

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the tensors, each storage once."""
        tensors = (self.codes, self.scale, self.zero, self.channel_scale)
        storages = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def channel_scales(x: Tensor) -> Tensor:
    """`sqrt(max_t |x|)` per channel of `[..., T, D]` in float16, 1 where a channel is zero."""
    if x.shape[-2] == 0:
        return x.new_ones(*x.shape[:-2], x.shape[-1], dtype=torch.float16)
    found = x.float().abs().amax(-2).sqrt().half()
    return torch.where(found > 0, found, 1.0)


def assert_quantizable(x: Tensor, format: Format, channel_scale: Tensor | None) -> None:
    """What every implementation relies on."""
    assert x.dim() >= 2, x.shape
    assert x.dtype in (torch.float16, torch.bfloat16, torch.float32), x.dtype
    if x.shape[-1] % format.planes:
        raise ValueError(
            f"{x.shape[-1]} channels do not fill bytes of {format.number}; "
            f"take a multiple of {format.planes}."
        )
    if format.axis == "channel" and x.shape[-2] % (format.group or 1):
        raise ValueError(
            f"{x.shape[-2]} tokens are no full groups of {format.group}; "
            f"keep the last {x.shape[-2] % (format.group or 1)} in 16 bits."
        )
    assert channel_scale is None or format.separable, format
    assert channel_scale is None or channel_scale.shape == (*x.shape[:-2], x.shape[-1])


REFUSED = "Only finite numbers up to 65504 are quantised; these hold NaN, infinite or larger ones."
