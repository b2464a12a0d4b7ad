"""Keys and values of one decoding step, and how its work is divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacheplan.kernels.quantize.packed import Packed

STEP = 128  # chunks are multiples of it, and so of every group of tokens
LEAST = 16  # tokens of one group of keys, the smallest side of a matrix instruction
WIDEST = 512  # bytes of a token's key: wider tiles spill
SHORTEST = 256  # tokens that are worth a program of their own


@dataclass(frozen=True, eq=False)
class Segment:
    """One part of the tokens of every row, all in one format.

    Row `b * Hkv + h` occupies `lengths[r]` tokens from `offsets[r]` (int32 `[R]`) in pools of keys
    `[N, D]` and values `[N, Dv]`; memory outside the rows is never read.  Packed pools have the
    same first dimension, but `channel_scale` is `[R, Dv]`; with keys in groups of tokens, offsets
    and lengths are multiples of the group.  `bias` float32 `[N]` is added to the logits: a token
    that stands for n merged ones has log n.
    """

    keys: Tensor | Packed
    values: Tensor | Packed
    offsets: Tensor
    lengths: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Work:
    """The programs of one step; its tensors may be overwritten in place for later steps.

    `items` has one int32 `[n, 4]` per segment: row, first token, end, slot of the partial result,
    longest first and padded with row -1.  An item ends where its row ends, if that is earlier, so
    one plan serves until rows outgrow it.  Row r owns the slots `ranges[r]` to `ranges[r + 1]`.
    """

    items: tuple[Tensor, ...]
    ranges: Tensor
    slots: int

    def copy_(self, other: Work) -> None:
        """Take over another plan of the same sizes: a captured CUDA graph then follows it."""
        assert self.slots == other.slots, (self.slots, other.slots)
        for own, new in zip((*self.items, self.ranges), (*other.items, other.ranges), strict=True):
            own.copy_(new)


def divide(
    lengths: Sequence[Sequence[int]],
    *,
    processors: int,
    chunk: int | None = None,
    slots: int | None = None,
    device: torch.device | str = "cpu",
) -> Work:
    """Divide rows into chunks of equal length, `lengths[segment][row]` tokens being the most.

    Lengths may exceed the present ones by what the coming steps append.  By default there are
    about two chunks per processor (streaming multiprocessor), so that one long row is no tail.
    `slots` fixes the sizes of all tensors; by default they are just large enough.
    """
    rows = len(lengths[0])
    if chunk is None:
        fair = sum(map(sum, lengths)) / (2 * processors)
        chunk = max(SHORTEST, STEP * -(-int(fair) // STEP))
    assert chunk % STEP == 0, chunk
    found: list[list[tuple[int, int, int, int]]] = [[] for _ in lengths]
    ranges = [0]
    for row in range(rows):
        slot = ranges[-1]
        for items, segment in zip(found, lengths, strict=True):
            for start in range(0, segment[row], chunk):
                items.append((row, start, min(start + chunk, segment[row]), slot))
                slot += 1
        ranges.append(slot)
    size = ranges[-1] if slots is None else slots
    if size < ranges[-1]:
        raise ValueError(f"The rows need {ranges[-1]} slots; {size} are too few.")
    tensors = []
    for items in found:
        items.sort(key=lambda item: item[1] - item[2])
        padding = [(-1, 0, 0, 0)] * ((len(items) if slots is None else size) - len(items))
        tensors.append(torch.tensor(items + padding, dtype=torch.int32).view(-1, 4).to(device))
    return Work(tuple(tensors), torch.tensor(ranges, dtype=torch.int32).to(device), size)


def assert_fitting(query: Tensor, segments: Sequence[Segment], sinks: Tensor | None) -> None:
    """What every implementation relies on."""
    B, H, D = query.shape
    rows = segments[0].lengths.shape[0]
    assert rows % B == 0, (B, rows)
    assert H % (rows // B) == 0, (H, B, rows)
    assert sinks is None or sinks.shape == (H,), (sinks, H)
    for segment in segments:
        assert segment.offsets.shape == segment.lengths.shape == (rows,), rows
        for index in (segment.offsets, segment.lengths):
            assert index.dtype == torch.int32, index.dtype
        tokens = token_count(segment.keys)
        assert token_count(segment.values) == tokens, tokens
        assert channel_count(segment.keys) == D, D
        assert channel_count(segment.values) == channel_count(segments[0].values), D
        assert segment.bias is None or segment.bias.shape == (tokens,), tokens
        assert segment.bias is None or segment.bias.dtype == torch.float32, segment.bias.dtype
        if isinstance(segment.values, Packed):
            if segment.values.format.axis == "channel":
                raise ValueError("Values are decoded from scales per token; take axis 'token'.")
            scale = segment.values.channel_scale
            assert scale is None or scale.shape == (rows, channel_count(segment.values)), rows
        if isinstance(segment.keys, Packed):
            assert not segment.keys.format.separable, "separable scales are for values"


def has_tiles(segment: Segment) -> bool:
    """Whether Triton's kernel reads it: groups are whole planes of bytes and tiles of tokens.

    Nor may tokens be wider than registers have room for.
    """
    for pool in (segment.keys, segment.values):
        if not isinstance(pool, Packed):
            if pool.shape[1] * pool.element_size() > WIDEST:
                return False
            continue
        by_channel = pool.format.axis == "channel"
        if by_channel and (pool.format.group or 0) % LEAST:
            return False
        if not pool.format.whole_planes(pool.channels):
            return False
    return True


def token_count(pool: Tensor | Packed) -> int:
    return int((pool.codes if isinstance(pool, Packed) else pool).shape[0])


def channel_count(pool: Tensor | Packed) -> int:
    return pool.channels if isinstance(pool, Packed) else int(pool.shape[1])
