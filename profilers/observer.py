"""Cache layers that watch: statistics are taken inside the attention call, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacheplan.adapters.attention import AttendingLayer, causal_attention
from cacheplan.profilers.damage import Nested, eviction_damage, kept_counts, nested_sets
from cacheplan.profilers.mass import mass_curve
from cacheplan.types import KVAction


@dataclass(frozen=True)
class Menu:
    """What is measured: every candidate at every keep fraction."""

    candidates: tuple[KVAction, ...]
    keeps: tuple[float, ...]


@dataclass(eq=False)
class LayerRecord:
    """One layer's statistics of one prompt, and what the ablation needs to replay it."""

    mass_curve: NDArray[np.float64]  # [M + 1]
    damage: NDArray[np.float64]  # [K, A, G]
    nested: list[Nested] | None = None  # one per candidate
    key: Tensor | None = None  # [1, K, C, D]
    value: Tensor | None = None


class Observer(AttendingLayer):
    """Attends like the stock model and hands the statistics of its layer to `sink`.

    Only the queries, keys and values of the layer at hand are alive at any time, unless
    `remember` asks for the context's cache.
    """

    def __init__(
        self, context: int, menu: Menu, *, remember: bool, sink: Callable[[LayerRecord], None]
    ) -> None:
        super().__init__()
        self.context, self.menu, self.remember, self.sink = context, menu, remember, sink

    def receive(self, key: Tensor, value: Tensor) -> None:
        self._key, self._value = key, value

    def attend(self, module: torch.nn.Module, query: Tensor, scale: float) -> Tensor:
        key, value, C, menu = self._key, self._value, self.context, self.menu
        output = causal_attention(module, query, key, value, scale)
        early, own = query[:, :, :C], key[:, :, :C]
        counts = kept_counts(menu.keeps, C)
        nested = [nested_sets(c, early, own, counts, scale=scale) for c in menu.candidates]
        damage = eviction_damage(query[:, :, C:], key, value, nested, scale=scale)
        record = LayerRecord(mass_curve(early, own, scale=scale), damage.cpu().numpy())
        if self.remember:
            record.nested = nested
            record.key, record.value = own.clone(), value[:, :, :C].clone()
        del self._key, self._value
        self.sink(record)
        return output


class Ablation(AttendingLayer):
    """Replays the continuation over a stored context, with some context keys hidden.

    `hidden` `[B, K, C]` bool hides context tokens of this layer, a different set for each batch
    entry; None hides nothing.
    """

    def __init__(self, record: LayerRecord, hidden: Tensor | None) -> None:
        super().__init__()
        assert record.key is not None
        assert record.value is not None
        self.record, self.hidden, self.seen = record, hidden, record.key.shape[2]

    def receive(self, key: Tensor, value: Tensor) -> None:
        assert self.record.key is not None
        assert self.record.value is not None
        B = key.shape[0]
        self._key = torch.cat([self.record.key.expand(B, -1, -1, -1), key], dim=2)
        self._value = torch.cat([self.record.value.expand(B, -1, -1, -1), value], dim=2)

    def attend(self, module: torch.nn.Module, query: Tensor, scale: float) -> Tensor:
        if self.hidden is None:
            return causal_attention(module, query, self._key, self._value, scale)
        T, S, G = query.shape[2], self._key.shape[2], query.shape[1] // self._key.shape[1]
        last = torch.arange(S - T, S, device=query.device)
        visible = torch.arange(S, device=query.device) <= last[:, None]
        shown = torch.cat([~self.hidden, self.hidden.new_ones(*self.hidden.shape[:2], T)], dim=2)
        mask = visible & shown[:, :, None]  # [B, K, T, S]
        output = torch.nn.functional.scaled_dot_product_attention(
            query,
            self._key.repeat_interleave(G, 1),
            self._value.repeat_interleave(G, 1),
            attn_mask=mask.repeat_interleave(G, 1),
            scale=scale,
        )
        return output.transpose(1, 2).contiguous()


def hidden_tokens(record: LayerRecord, probes: Sequence[tuple[int, int]]) -> Tensor:
    """What each (kv head, probe) pair hides, as a batch: `[K * P, K, C]` bool.

    A probe is (candidate index, keep index).  Batch entry `h * P + p` evicts head h by probe p
    and leaves the layer's other heads whole.
    """
    assert record.nested is not None
    K, C = record.nested[0].order.shape
    hidden = torch.zeros(K, len(probes), K, C, dtype=torch.bool)
    for p, (candidate, keep) in enumerate(probes):
        nested = record.nested[candidate]
        for h in range(K):
            hidden[h, p, h, nested.order[h, nested.counts[h][keep] :].cpu()] = True
    return hidden.flatten(0, 1).to(record.nested[0].order.device)
