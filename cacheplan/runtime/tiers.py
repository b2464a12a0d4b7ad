"""Rows in few bits: packed tiers of older tokens, and the newest as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cacheplan.adapters.packing import packing
from cacheplan.kernels.decode_attention.cpu_int8 import Int8Row
from cacheplan.kernels.decode_attention.segments import Segment, Work
from cacheplan.kernels.quantize.dispatch import dequantize, quantize
from cacheplan.kernels.quantize.packed import Format, Packed
from cacheplan.plans.storage import divide, flush_tokens, for_int8_product, high_tier
from cacheplan.runtime.int8_tier import Int8Tier
from cacheplan.runtime.rows import RaggedRows
from cacheplan.types import KVAction, Tier

Pool = Tensor | Packed


class PackedTier:
    """The tokens of some rows in one precision: pools `[N, D]`, row after row, without slack."""

    def __init__(self, tier: Tier, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Store keys `[n, D]` and values `[n, Dv]` of every row."""
        self.formats = packing(tier.key), packing(tier.value)
        self.pools: tuple[Pool, Pool] = (
            _joined([_stored(own, self.formats[0]) for own in keys]),
            _joined([_stored(own, self.formats[1]) for own in values]),
        )
        self._measure([len(own) for own in keys])

    def _measure(self, lengths: list[int]) -> None:
        device = _of(self.pools[0]).device
        self.lengths = lengths
        self.starts = [sum(lengths[:r]) for r in range(len(lengths))]
        self._segment = Segment(
            *self.pools,
            torch.tensor(self.starts, dtype=torch.int32, device=device),
            torch.tensor(lengths, dtype=torch.int32, device=device),
        )

    @property
    def segment(self) -> Segment:
        return self._segment

    @property
    def nbytes(self) -> int:
        return sum(
            pool.nbytes if isinstance(pool, Packed) else pool.untyped_storage().nbytes()
            for pool in self.pools
        )

    def row(self, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of one row as numbers of `dtype`."""
        key, value = (self._part(pool, r) for pool in self.pools)
        return _numbers(key, dtype), _numbers(value, dtype)

    def append(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Add tokens to the end of every row; what is stored is copied, never packed again."""
        pools = []
        for pool, format, new in zip(self.pools, self.formats, (keys, values), strict=True):
            rows = []
            for r, own in enumerate(new):
                old = self._part(pool, r)
                fixed = isinstance(old, Packed) and self.lengths[r] > 0
                scales = old.channel_scale if fixed and isinstance(old, Packed) else None
                rows.append(_joined([old, _stored(own, format, scales)], one_row=True))
            pools.append(_joined(rows))
        self.pools = pools[0], pools[1]
        self._measure([n + len(own) for n, own in zip(self.lengths, keys, strict=True)])

    def select(self, rows: Sequence[int]) -> None:
        """Rows in this order, repeated or left out."""
        keys, values = ([self._part(pool, r) for r in rows] for pool in self.pools)
        self.pools = _joined(keys), _joined(values)
        self._measure([self.lengths[r] for r in rows])

    def _part(self, pool: Pool, r: int) -> Pool:
        first, end = self.starts[r], self.starts[r] + self.lengths[r]
        if isinstance(pool, Tensor):
            return pool[first:end]
        by_channel = pool.format.axis == "channel"
        group = pool.format.group or 1
        scales = slice(first // group, end // group) if by_channel else slice(first, end)
        return replace(
            pool,
            codes=pool.codes[first:end],
            scale=pool.scale[scales],
            zero=None if pool.zero is None else pool.zero[scales],
            channel_scale=None if pool.channel_scale is None else pool.channel_scale[r],
        )


class TieredRows:
    """Rows of the kv heads that follow one action in few bits; takes the place of `RaggedRows`.

    `exact` holds the newest tokens.  Tokens are packed once, `flush` at a time, before the step in
    which there would be more than that many new ones: what a step brought can be taken back.
    """

    def __init__(self, rows: RaggedRows, action: KVAction, kept: list[Tensor]) -> None:
        """Take over whole rows, of which the tokens `kept` (ascending) stay by `action`."""
        self.action, self.flush = action, flush_tokens(action)
        self.batch, self.heads = rows.batch, rows.heads
        self.flushed = [0] * rows.batch
        self.work: tuple[list[tuple[int, ...]], Work] | None = None  # of a GPU's last step
        device = rows.keys.device
        high, low, exact = [], [], []
        for r, own in enumerate(kept):
            n = rows.lengths[r]
            loses = torch.ones(n, dtype=torch.bool, device=device)
            loses[own] = False
            losers = loses.nonzero()[:, 0]
            tokens = divide(action, len(own), len(losers))
            high.append(own[: tokens.high])
            low.append(losers[: tokens.low])
            rest = losers[tokens.low :] if action.low is not None else losers[:0]
            exact.append(torch.cat([own[tokens.high :], rest]).sort().values)
        tier = high_tier(action)
        self.high: PackedTier | Int8Tier | None = None
        if tier is not None:
            kind = Int8Tier if for_int8_product(tier) else PackedTier
            self.high = kind(tier, *_taken(rows, high))
        self.low = None if action.low is None else PackedTier(action.low, *_taken(rows, low))
        rows.keep(exact)
        self.exact = rows

    @property
    def tiers(self) -> list[PackedTier | Int8Tier]:
        return [tier for tier in (self.low, self.high) if tier is not None]

    @property
    def lengths(self) -> list[int]:
        parts = [tier.lengths for tier in self.tiers] + [self.exact.lengths]
        return [sum(own) for own in zip(*parts, strict=True)]

    @property
    def element_size(self) -> int:
        return self.exact.element_size

    @property
    def appended(self) -> list[int]:
        """Tokens taken since the prompt per batch entry, the most there have been."""
        return [f + a for f, a in zip(self.flushed, self.exact.appended, strict=True)]

    @property
    def nbytes(self) -> int:
        return sum(tier.nbytes for tier in self.tiers) + self.exact.nbytes

    def append(self, key: Tensor, value: Tensor, valid: list[Tensor] | None = None) -> None:
        self._flush()
        self.exact.append(key, value, valid)

    def drop_newest(self, tokens: int) -> None:
        self.exact.drop_newest(tokens)

    def select(self, entries: Sequence[int]) -> None:
        rows = [r for b in entries for r in self.exact.of_entry(b)]
        for tier in self.tiers:
            tier.select(rows)
        self.exact.select(entries)
        self.batch, self.flushed = len(entries), [self.flushed[b] for b in entries]

    def segments(self) -> list[Segment]:
        """All tokens, as the attention of a single new token reads them."""
        packed = [tier.segment for tier in self.tiers if isinstance(tier, PackedTier)]
        return [*packed, self.exact.segment]

    @property
    def room(self) -> list[tuple[int, ...]]:
        """The most tokens that the rows of each segment can hold as they lie."""
        packed = [tuple(tier.lengths) for tier in self.tiers if isinstance(tier, PackedTier)]
        return [*packed, *self.exact.room]

    def int8_rows(self) -> list[Int8Row] | None:
        """All tokens for the CPU's int8 product, None if they are not stored for it."""
        if not isinstance(self.high, Int8Tier):
            return None
        exact, places = self.exact, map(self.exact.row, range(len(self.exact.lengths)))
        return [
            Int8Row(parts, exact.keys[place].bfloat16(), exact.values[place].bfloat16())
            for parts, place in zip(self.high.rows, places, strict=True)
        ]

    def numbers(self, entries: range) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """Pools of all tokens of some entries as numbers, with offsets and lengths of their rows.

        The newest tokens are last in every row.
        """
        dtype = self.exact.keys.dtype
        keys, values = [], []
        for r in (r for b in entries for r in self.exact.of_entry(b)):
            parts = [tier.row(r, dtype) for tier in self.tiers]
            place = self.exact.row(r)
            parts.append((self.exact.keys[place], self.exact.values[place]))
            keys.append(torch.cat([key for key, _ in parts]))
            values.append(torch.cat([value for _, value in parts]))
        lengths = [len(own) for own in keys]
        offsets = [sum(lengths[:r]) for r in range(len(lengths))]
        return torch.cat(keys), torch.cat(values), offsets, lengths

    def _flush(self) -> None:
        """Pack the oldest exact tokens of entries that have taken enough new ones."""
        if self.flush is None or self.high is None:
            return
        exact = self.exact
        full = [held // self.flush * self.flush for held in exact.held]
        if not any(full):
            return
        counts = [full[b] for b in range(self.batch) for _ in range(self.heads)]
        device = exact.keys.device
        old = [torch.arange(count, device=device) for count in counts]
        self.high.append(*_taken(exact, old))
        exact.drop_oldest(full)
        self.flushed = [f + done for f, done in zip(self.flushed, full, strict=True)]


def _taken(rows: RaggedRows, tokens: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    places = [own + offset for own, offset in zip(tokens, rows.offsets, strict=True)]
    return [rows.keys[place] for place in places], [rows.values[place] for place in places]


def _stored(x: Tensor, format: Format | None, scales: Tensor | None = None) -> Pool:
    return x if format is None else quantize(x, format, scales)


def _numbers(pool: Pool, dtype: torch.dtype) -> Tensor:
    return pool.to(dtype) if isinstance(pool, Tensor) else dequantize(pool, dtype)


def _of(pool: Pool) -> Tensor:
    return pool if isinstance(pool, Tensor) else pool.codes


def _joined(parts: Sequence[Pool], *, one_row: bool = False) -> Pool:
    """Rows, or (`one_row`) parts of one row, one after the other."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if tensors:
        return torch.cat(tensors)
    first, *_ = own = [part for part in parts if isinstance(part, Packed)]
    scales = [part.channel_scale for part in own if part.channel_scale is not None]
    zeros = [part.zero for part in own if part.zero is not None]
    return Packed(
        torch.cat([part.codes for part in own]),
        torch.cat([part.scale for part in own]),
        torch.cat(zeros) if zeros else None,
        (scales[-1] if one_row else torch.stack(scales)) if scales else None,
        first.format,
    )
