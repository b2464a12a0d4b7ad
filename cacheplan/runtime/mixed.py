"""A layer whose kv heads are stored in different ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cacheplan.plans.storage import in_few_bits
from cacheplan.runtime.eviction import Groups
from cacheplan.runtime.rows import RaggedRows
from cacheplan.runtime.tiers import TieredRows
from cacheplan.types import KVAction


class MixedRows:
    """The kv heads of one layer in parts, each in a storage of its own.

    Takes the place of `RaggedRows` where some head has few bits.
    """

    def __init__(self, rows: RaggedRows, groups: Groups, kept: Mapping[int, Tensor]) -> None:
        """Divide a layer's rows; `kept` are those tokens that stay of rows that demote others."""
        self.batch, self.heads = rows.batch, rows.heads
        self.places: list[Tensor] = []  # the heads of each part, where they are needed
        self.parts: list[tuple[list[int], RaggedRows | TieredRows]] = []
        for heads, action in _by_storage(groups):
            own = rows.of_heads(heads)
            self.places.append(torch.tensor(heads, device=rows.keys.device))
            if not in_few_bits(action):
                self.parts.append((heads, own))
                continue
            stay = []
            for b in range(rows.batch):
                for h in heads:
                    r = b * rows.heads + h
                    stay.append(kept[r] if r in kept else rows.every(r))
            self.parts.append((heads, TieredRows(own, action, stay)))

    @property
    def rectangular(self) -> bool:
        return False

    @property
    def element_size(self) -> int:
        return self.parts[0][1].element_size

    @property
    def lengths(self) -> list[int]:
        """Tokens held per row (batch entry * kv heads + kv head)."""
        found = [0] * (self.batch * self.heads)
        for heads, part in self.parts:
            lengths = iter(part.lengths)
            for b in range(self.batch):
                for h in heads:
                    found[b * self.heads + h] = next(lengths)
        return found

    @property
    def appended(self) -> list[int]:
        return self.parts[0][1].appended

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for _, part in self.parts)

    def flushed(self, b: int) -> dict[int, int]:
        """Generated tokens of a batch entry that have been packed so far, by kv head."""
        return {
            h: part.flushed[b]
            for heads, part in self.parts
            for h in heads
            if isinstance(part, TieredRows)
        }

    def append(self, key: Tensor, value: Tensor, valid: list[Tensor] | None = None) -> None:
        for heads, (_, part) in zip(self.places, self.parts, strict=True):
            part.append(key[:, heads], value[:, heads], valid)

    def drop_newest(self, tokens: int) -> None:
        for _, part in self.parts:
            part.drop_newest(tokens)

    def select(self, entries: Sequence[int]) -> None:
        for _, part in self.parts:
            part.select(entries)
        self.batch = len(entries)


def _by_storage(groups: Groups) -> list[tuple[list[int], KVAction]]:
    """Heads that are stored alike, ascending, with an action that says how."""
    found: dict[object, tuple[list[int], KVAction]] = {}
    for heads, action in groups:
        how = (action.key, action.value, action.low) if in_few_bits(action) else None
        found.setdefault(how, ([], action))[0].extend(heads)
    return [(sorted(heads), action) for heads, action in found.values()]
