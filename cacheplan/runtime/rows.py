"""Storage of one layer's keys and values when every row may have its own length."""

from __future__ import annotations

import torch
from torch import Tensor

from cacheplan.plans.rows import SLACK


class RaggedRows:
    """Pools `[N, D]` in which each (batch entry, kv head) owns one stretch of tokens.

    After `keep` the pools hold exactly the kept tokens.  Appending takes slack of `SLACK`
    tokens a row at a time, so most steps copy only the new tokens.  `state` is an optional
    float32 number per token (accumulated scores) that moves along.
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        """Take keys `[B, K, S, D]` and values `[B, K, S, Dv]` as B * K rows of S tokens."""
        B, K, S, _ = key.shape
        self.batch, self.heads = B, K
        self.keys = key.reshape(B * K * S, -1)
        self.values = value.reshape(B * K * S, -1)
        self.state: Tensor | None = None
        self.lengths = [S] * (B * K)
        self.capacity = [S] * (B * K)
        self.offsets = _starts(self.capacity)
        self.appended = 0  # tokens every row has taken since the pools were last exact

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the pools, slack included."""
        pools = [self.keys, self.values] + ([] if self.state is None else [self.state])
        storages = {pool.untyped_storage().data_ptr(): pool.untyped_storage() for pool in pools}
        return sum(storage.nbytes() for storage in storages.values())

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

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add T tokens `[B, K, T, D]` to the end of every row."""
        rows, T = self.batch * self.heads, key.shape[2]
        if any(n + T > c for n, c in zip(self.lengths, self.capacity, strict=True)):
            self._grow(T)
        new_keys, new_values = key.reshape(rows, T, -1), value.reshape(rows, T, -1)
        if self.rectangular:
            n, shape = self.lengths[0], (rows, self.capacity[0], -1)
            self.keys.view(shape)[:, n : n + T] = new_keys
            self.values.view(shape)[:, n : n + T] = new_values
        else:
            ends = torch.tensor(self.offsets) + torch.tensor(self.lengths)
            place = (ends[:, None] + torch.arange(T)).flatten().to(self.keys.device)
            self.keys[place] = new_keys.flatten(0, 1)
            self.values[place] = new_values.flatten(0, 1)
        self.lengths = [n + T for n in self.lengths]
        self.appended += T

    def keep(self, kept: list[Tensor]) -> None:
        """Keep only the given tokens of every row (ascending indices) and free the rest."""
        if self.capacity == [len(k) for k in kept]:
            return
        index = torch.cat([k + o for k, o in zip(kept, self.offsets, strict=True)])
        self.keys = self.keys[index]
        self.values = self.values[index]
        if self.state is not None:
            self.state = self.state[index]
        self.lengths = [len(k) for k in kept]
        self.capacity = list(self.lengths)
        self.offsets = _starts(self.capacity)
        self.appended = 0

    def _grow(self, tokens: int) -> None:
        more = SLACK * (-(-(self.appended + tokens) // SLACK) + -self.appended // SLACK)
        capacity = [c + more for c in self.capacity]
        offsets = _starts(capacity)
        total = sum(capacity)
        old = torch.cat(
            [torch.arange(s.start, s.stop) for s in map(self.row, range(len(capacity)))]
        )
        shift = torch.tensor(offsets) - torch.tensor(self.offsets)
        new = old + shift.repeat_interleave(torch.tensor(self.lengths))
        old, new = old.to(self.keys.device), new.to(self.keys.device)
        self.keys = _moved(self.keys, old, new, total)
        self.values = _moved(self.values, old, new, total)
        if self.state is not None:
            self.state = _moved(self.state, old, new, total)
        self.capacity, self.offsets = capacity, offsets


def _starts(capacity: list[int]) -> list[int]:
    starts, at = [], 0
    for size in capacity:
        starts.append(at)
        at += size
    return starts


def _moved(pool: Tensor, old: Tensor, new: Tensor, total: int) -> Tensor:
    moved = pool.new_zeros(total, *pool.shape[1:])
    moved[new] = pool[old]
    return moved
