"""Storage of one layer's keys and values when every row may have its own length."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import pairwise

import torch
from torch import Tensor

from cacheplan.plans.rows import SLACK
from cacheplan.scorers.merging import Row


class RaggedRows:
    """Pools `[N, D]` in which each (batch entry, kv head) owns one stretch of tokens.

    After `keep` the pools hold exactly the kept tokens.  Appending takes slack of `SLACK`
    tokens a row at a time, so most steps write only the new tokens, in place.  Optional pools of
    one float32 number per token move along, 0 for new tokens: `state` (accumulated scores) and
    `bias` (added to the token's logit: the log of how many were merged into it).
    """

    def __init__(self, key: Tensor, value: Tensor, valid: list[Tensor] | None = None) -> None:
        """Take keys `[B, K, S, D]` and values `[B, K, S, Dv]` as B * K rows.

        `valid` are the tokens to take of every batch entry; None takes all, without a copy.
        """
        B, K, S, _ = key.shape
        self.batch, self.heads = B, K
        self.keys, self.values = _flat(key, valid), _flat(value, valid)
        self.state: Tensor | None = None
        self.bias: Tensor | None = None
        counts = [S] * B if valid is None else [len(tokens) for tokens in valid]
        self._exact([count for count in counts for _ in range(K)])

    def _exact(self, lengths: list[int]) -> None:
        """The pools hold these rows and nothing else."""
        self.lengths, self.capacity = lengths, list(lengths)
        self.offsets = _starts(lengths)
        self._ends = torch.tensor(
            [o + n for o, n in zip(self.offsets, lengths, strict=True)], device=self.keys.device
        )
        self.appended = [0] * self.batch  # tokens since then, the most there have been

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
        own._gather(_spans([self.offsets[r] for r in rows], lengths, self.keys.device))
        own._exact(lengths)
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
        if valid is None:
            place = (self._ends[:, None] + torch.arange(T, device=self._ends.device)).flatten()
        else:
            place = _spans(self._ends.tolist(), new, self._ends.device)
        self.keys[place] = _flat(key, valid)
        self.values[place] = _flat(value, valid)
        for pool in (self.state, self.bias):
            if pool is not None:
                pool[place] = 0.0
        before = self.held
        self.lengths = [n + t for n, t in zip(self.lengths, new, strict=True)]
        self._ends += T if valid is None else torch.tensor(new, device=self._ends.device)
        held = [b + t for b, t in zip(before, counts, strict=True)]
        self.appended = [max(most, now) for most, now in zip(self.appended, held, strict=True)]

    def extended(self, key: Tensor, value: Tensor, valid: list[Tensor] | None = None) -> RaggedRows:
        """A copy with tokens appended, while these rows stay as they are."""
        longer = copy(self)
        longer._ends = self._ends.clone()
        longer.append(key, value, valid)
        return longer

    def drop_newest(self, tokens: int) -> None:
        """Take back the last `tokens` of every row; their room stays."""
        if tokens > min(self.held):
            raise ValueError(f"{tokens} tokens are to be dropped, {min(self.held)} are new")
        self.lengths = [n - tokens for n in self.lengths]
        self._ends -= tokens

    def drop_oldest(self, counts: Sequence[int]) -> None:
        """Take away the first `counts[b]` tokens of every row of entry b, and the room for them."""
        held = [now - count for now, count in zip(self.held, counts, strict=True)]
        rows = [(r, r // self.heads) for r in range(len(self.lengths))]
        starts = [self.offsets[r] + counts[b] for r, b in rows]
        lengths = [self.lengths[r] - counts[b] for r, b in rows]
        room = [_blocks(held[b]) - _blocks(self.appended[b]) for b in range(self.batch)]
        capacity = [self.capacity[r] + room[b] for r, b in rows]
        offsets, device = _starts(capacity), self.keys.device
        self._move(_spans(starts, lengths, device), _spans(offsets, lengths, device), capacity)
        self.lengths, self.appended = lengths, held
        ends = [o + n for o, n in zip(offsets, lengths, strict=True)]
        self._ends = torch.tensor(ends, device=device)

    def keep(self, kept: list[Tensor]) -> None:
        """Keep only the given tokens of every row (ascending indices) and free the rest."""
        if self.capacity == [len(k) for k in kept]:
            return
        self._gather(torch.cat([k + o for k, o in zip(kept, self.offsets, strict=True)]))
        self._exact([len(k) for k in kept])

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
        appended = [self.appended[b] for b in entries]
        offsets = [self.offsets[r] for r in rows]
        self._gather(_spans(offsets, capacity, self.keys.device))
        self.batch = len(entries)
        self._exact(capacity)
        self.lengths, self.appended = lengths, appended
        self._ends = self._ends.new_tensor(
            [o + n for o, n in zip(self.offsets, lengths, strict=True)]
        )

    @property
    def held(self) -> list[int]:
        """Tokens appended to each entry since the pools were exact, and not dropped again."""
        first = [self.of_entry(b)[0] for b in range(self.batch)]
        return [
            self.lengths[r] - self.capacity[r] + SLACK * -(-most // SLACK)
            for r, most in zip(first, self.appended, strict=True)
        ]

    def _gather(self, index: Tensor) -> None:
        index = index.to(self.keys.device)
        self.keys, self.values = self.keys[index], self.values[index]
        self.state = None if self.state is None else self.state[index]
        self.bias = None if self.bias is None else self.bias[index]

    def _grow(self, new: list[int]) -> None:
        held = self.held
        most = [max(a, h + t) for a, h, t in zip(self.appended, held, new, strict=True)]
        more = [_blocks(now) - _blocks(then) for now, then in zip(most, self.appended, strict=True)]
        capacity = [c + more[r // self.heads] for r, c in enumerate(self.capacity)]
        offsets, device = _starts(capacity), self.keys.device
        old = _spans(self.offsets, self.lengths, device)
        shift = torch.tensor(offsets, device=device) - torch.tensor(self.offsets, device=device)
        self._move(old, _spans(offsets, self.lengths, device), capacity)
        self._ends += shift
        self.appended = most

    def _move(self, old: Tensor, new: Tensor, capacity: list[int]) -> None:
        """Put tokens into pools with other room for every row."""
        total = sum(capacity)
        self.keys, self.values = (
            _moved(pool, old, new, total) for pool in (self.keys, self.values)
        )
        self.state = None if self.state is None else _moved(self.state, old, new, total)
        self.bias = None if self.bias is None else _moved(self.bias, old, new, total)
        self.capacity, self.offsets = capacity, _starts(capacity)


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


def _moved(pool: Tensor, old: Tensor, new: Tensor, total: int) -> Tensor:
    moved = pool.new_zeros(total, *pool.shape[1:])
    moved[new] = pool[old]
    return moved
