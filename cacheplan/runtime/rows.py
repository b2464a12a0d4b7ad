"""Storage of one layer's keys and values when every row may have its own length."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import pairwise

import torch
from torch import Tensor

from cacheplan.kernels.compact import dispatch as compact
from cacheplan.kernels.decode_attention.segments import Segment, Work
from cacheplan.plans.rows import SLACK
from cacheplan.scorers.merging import Row


class RaggedRows:
    """Pools `[N, D]` in which each (batch entry, kv head) owns one stretch of tokens.

    After `keep` the pools hold exactly the kept tokens.  Appending takes slack of `SLACK`
    tokens a row at a time, so most steps write only the new tokens, in place.  Optional pools of
    one float32 number per token move along, 0 for new tokens: `state` (accumulated scores) and
    `bias` (added to the token's logit: the log of how many were merged into it).

    Where rows lie is known to the host (`offsets`, `lengths`) and, for kernels, to the device: a
    step that takes no new room tells it nothing.  `work` is the division of a GPU's last step.
    """

    work: tuple[list[tuple[int, ...]], Work] | None = None

    def __init__(self, key: Tensor, value: Tensor, valid: list[Tensor] | None = None) -> None:
        """Take keys `[B, K, S, D]` and values `[B, K, S, Dv]` as B * K rows.

        `valid` are the tokens to take of every batch entry; None takes all, without a copy.
        """
        B, K, S, _ = key.shape
        self.batch, self.heads = B, K
        self.keys, self.values = _flat(key, valid).contiguous(), _flat(value, valid).contiguous()
        self.state: Tensor | None = None
        self.bias: Tensor | None = None
        counts = [S] * B if valid is None else [len(tokens) for tokens in valid]
        lengths = [count for count in counts for _ in range(K)]
        self._place(lengths, lengths)
        self.appended = [0] * B  # tokens since the pools were exact, the most there have been

    def _place(self, lengths: list[int], capacity: list[int]) -> None:
        """The rows lie one after the other, each at the start of its room."""
        self.lengths, self.capacity, self.offsets = lengths, list(capacity), _starts(capacity)
        places = torch.tensor([self.offsets, lengths], dtype=torch.int32)
        self._offsets, self._lengths = places.to(self.keys.device)

    @property
    def segment(self) -> Segment:
        """The pools as kernels read them; while no room is taken, its tensors stay in place."""
        return Segment(self.keys, self.values, self._offsets, self._lengths, self.bias)

    def segments(self) -> list[Segment]:
        return [self.segment]

    @property
    def room(self) -> list[tuple[int, ...]]:
        """The most tokens that the rows of each segment can hold as they lie."""
        return [tuple(self.capacity)]

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the pools, slack included."""
        optional = [pool for pool in (self.state, self.bias) if pool is not None]
        pools = [self.keys, self.values, *optional]
        storages = {pool.untyped_storage().data_ptr(): pool.untyped_storage() for pool in pools}
        return sum(storage.nbytes() for storage in storages.values())

    @property
    def element_size(self) -> int:
        return self.keys.element_size()

    @property
    def rectangular(self) -> bool:
        """Whether all rows are alike, so that the pools are views of ordinary `[B, K, S, D]`."""
        return len(set(self.lengths)) == 1 and len(set(self.capacity)) == 1

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values as `[B, K, S, D]` views; only for rectangular rows."""
        shape = self.batch, self.heads, self.capacity[0], -1
        length = self.lengths[0]
        return self.keys.view(shape)[:, :, :length], self.values.view(shape)[:, :, :length]

    def row(self, r: int) -> slice:
        return slice(self.offsets[r], self.offsets[r] + self.lengths[r])

    def every(self, r: int) -> Tensor:
        """The indices of all tokens of a row."""
        return torch.arange(self.lengths[r], device=self.keys.device)

    def of_heads(self, heads: Sequence[int]) -> RaggedRows:
        """A copy of the rows of some kv heads, which must be exact; these stay as they are."""
        own = copy(self)
        rows = [b * self.heads + h for b in range(self.batch) for h in heads]
        own.heads = len(heads)
        lengths = [self.lengths[r] for r in rows]
        own._move([self.offsets[r] for r in rows], lengths, lengths)
        own.appended = [0] * self.batch
        return own

    def numbers(self, entries: range) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """Pools, and offsets and lengths of the rows of some batch entries."""
        some = slice(entries.start * self.heads, entries.stop * self.heads)
        return self.keys, self.values, self.offsets[some], self.lengths[some]

    def of_entry(self, b: int) -> range:
        """The rows of one batch entry, by kv head."""
        return range(b * self.heads, (b + 1) * self.heads)

    def together(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Keys and values `[len(rows), n, D]` of rows of one length n; views where they can be."""
        length, start = self.lengths[rows[0]], self.offsets[rows[0]]
        steps = {self.offsets[b] - self.offsets[a] for a, b in pairwise(rows)}
        if len(steps) < 2 and min(steps, default=0) >= 0:
            step = min(steps, default=0)
            return tuple(  # type: ignore[return-value]
                pool[start:].as_strided(
                    (len(rows), length, pool.shape[1]),
                    (step * pool.stride(0), pool.stride(0), pool.stride(1)),
                )
                for pool in (self.keys, self.values)
            )
        places = [self.row(r) for r in rows]
        return (
            torch.stack([self.keys[place] for place in places]),
            torch.stack([self.values[place] for place in places]),
        )

    def append(self, key: Tensor, value: Tensor, valid: list[Tensor] | None = None) -> None:
        """Add the T tokens `[B, K, T, D]`, or the `valid` ones of each entry, to its rows' ends."""
        T = key.shape[2]
        counts = [T] * self.batch if valid is None else [len(tokens) for tokens in valid]
        new = [count for count in counts for _ in range(self.heads)]
        if any(n + t > c for n, t, c in zip(self.lengths, new, self.capacity, strict=True)):
            self._grow(counts)
        for pool in (self.state, self.bias):
            if pool is not None:
                pool[self._next(new)] = 0.0
        if valid is None:
            where = {"offsets": self._offsets, "lengths": self._lengths}
            compact.append(self.keys, self.values, key.flatten(0, 1), value.flatten(0, 1), **where)
        else:
            place = self._next(new)
            self.keys[place], self.values[place] = _flat(key, valid), _flat(value, valid)
            self._lengths += torch.tensor(new, dtype=torch.int32, device=place.device)
        before = self.held
        self.lengths = [n + t for n, t in zip(self.lengths, new, strict=True)]
        held = [b + t for b, t in zip(before, counts, strict=True)]
        self.appended = [max(most, now) for most, now in zip(self.appended, held, strict=True)]

    def _next(self, new: list[int]) -> Tensor:
        """The places of `new[r]` more tokens of every row, row after row."""
        ends = self._offsets + self._lengths
        if len(set(new)) == 1:  # without a word from the device
            place: Tensor = ends[:, None] + torch.arange(new[0], device=ends.device)
            return place.flatten()
        return _spans(ends.tolist(), new, ends.device)

    def extended(self, key: Tensor, value: Tensor, valid: list[Tensor] | None = None) -> RaggedRows:
        """A copy with tokens appended, while these rows stay as they are."""
        longer = copy(self)
        longer._lengths = self._lengths.clone()
        longer.append(key, value, valid)
        return longer

    def drop_newest(self, tokens: int) -> None:
        """Take back the last `tokens` of every row; their room stays."""
        if tokens > min(self.held):
            raise ValueError(f"{tokens} tokens are to be dropped, {min(self.held)} are new")
        self.lengths = [n - tokens for n in self.lengths]
        self._lengths -= tokens

    def drop_oldest(self, counts: Sequence[int]) -> None:
        """Take away the first `counts[b]` tokens of every row of entry b, and the room for them."""
        held = [now - count for now, count in zip(self.held, counts, strict=True)]
        rows = [(r, r // self.heads) for r in range(len(self.lengths))]
        starts = [self.offsets[r] + counts[b] for r, b in rows]
        lengths = [self.lengths[r] - counts[b] for r, b in rows]
        room = [_blocks(held[b]) - _blocks(self.appended[b]) for b in range(self.batch)]
        self._move(starts, lengths, [self.capacity[r] + room[b] for r, b in rows])
        self.appended = held

    def keep(self, kept: list[Tensor]) -> None:
        """Keep only the given tokens of every row (ascending indices) and free the rest."""
        if self.capacity == [len(k) for k in kept]:
            return
        lengths = [len(k) for k in kept]
        places = torch.cat([k + o for k, o in zip(kept, self.offsets, strict=True)])
        self._fill(places, lengths, lengths)
        self.appended = [0] * self.batch

    def merged(self, r: int) -> Row:
        """One row with the number of tokens that each of its tokens stands for."""
        place = self.row(r)
        count = self.keys.new_ones(self.lengths[r], dtype=torch.float32)
        if self.bias is not None:
            count = self.bias[place].exp().round()
        return Row(self.keys[place], self.values[place], count)

    def write(self, r: int, row: Row) -> None:
        """Put other keys, values and numbers of tokens in the place of those that a row holds."""
        place = self.row(r)
        self.keys[place], self.values[place] = row.key, row.value
        if self.bias is not None:
            self.bias[place] = row.count.log()

    def select(self, entries: Sequence[int]) -> None:
        """Batch entries in this order, repeated or left out."""
        rows = [r for b in entries for r in self.of_entry(b)]
        capacity, lengths = [self.capacity[r] for r in rows], [self.lengths[r] for r in rows]
        self._move([self.offsets[r] for r in rows], lengths, capacity)
        self.batch, self.appended = len(entries), [self.appended[b] for b in entries]

    @property
    def held(self) -> list[int]:
        """Tokens appended to each entry since the pools were exact, and not dropped again."""
        first = [self.of_entry(b)[0] for b in range(self.batch)]
        return [
            self.lengths[r] - self.capacity[r] + SLACK * -(-most // SLACK)
            for r, most in zip(first, self.appended, strict=True)
        ]

    def _grow(self, new: list[int]) -> None:
        held = self.held
        most = [max(a, h + t) for a, h, t in zip(self.appended, held, new, strict=True)]
        more = [_blocks(now) - _blocks(then) for now, then in zip(most, self.appended, strict=True)]
        capacity = [c + more[r // self.heads] for r, c in enumerate(self.capacity)]
        self._move(self.offsets, self.lengths, capacity)
        self.appended = most

    def _move(self, starts: list[int], lengths: list[int], capacity: list[int]) -> None:
        """Make rows of `lengths[r]` tokens from `starts[r]` on, and give each other room."""
        self._fill(_spans(starts, lengths, self.keys.device), lengths, capacity)

    def _fill(self, tokens: Tensor, lengths: list[int], capacity: list[int]) -> None:
        """Make rows of these tokens of the pools, `lengths[r]` for each, with room for more."""
        device, old = self.keys.device, tokens.int().to(self.keys.device)
        ranges = torch.tensor([*_starts(lengths), sum(lengths)], dtype=torch.int32, device=device)
        self._place(lengths, capacity)

        def moved(pool: Tensor) -> Tensor:
            new = pool.new_empty(sum(capacity), *pool.shape[1:])
            source, target = (own if own.dim() == 2 else own[:, None] for own in (pool, new))
            every = source.expand(len(lengths), -1, -1)  # tokens are numbered through all rows
            longest = max(lengths, default=0)
            compact.gather(every, old, ranges, target, self._offsets, longest=longest)
            return new

        self.keys, self.values = moved(self.keys), moved(self.values)
        self.state = None if self.state is None else moved(self.state)
        self.bias = None if self.bias is None else moved(self.bias)


def _blocks(tokens: int) -> int:
    return SLACK * -(-tokens // SLACK)


def _flat(tensor: Tensor, valid: list[Tensor] | None) -> Tensor:
    """`[B, K, S, D]` as a pool `[N, D]` of its valid tokens."""
    width = tensor.shape[-1]
    if valid is None:
        return tensor.reshape(-1, width)
    return torch.cat(
        [entry[:, own].reshape(-1, width) for entry, own in zip(tensor, valid, strict=True)]
    )


def _starts(capacity: list[int]) -> list[int]:
    starts, at = [], 0
    for size in capacity:
        starts.append(at)
        at += size
    return starts


def _spans(starts: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """`starts[r], starts[r] + 1, ...`, `counts[r]` of them, row after row."""
    first, count = torch.tensor(starts), torch.tensor(counts)
    before = count.cumsum(0) - count
    return ((first - before).repeat_interleave(count) + torch.arange(int(count.sum()))).to(device)
