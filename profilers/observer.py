"""Cache layers that watch: statistics are taken inside the attention call, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacheplan.adapters.attention import AttendingLayer, Step, causal_attention
from cacheplan.adapters.rotary import rotary_frequencies
from cacheplan.kernels.ragged_attention.naive import ragged_attention
from cacheplan.profilers.damage import Nested, eviction_damage, kept_counts, nested_sets
from cacheplan.profilers.layer_statistics import (
    key_distance,
    output_energy,
    spectral_residual,
)
from cacheplan.profilers.mass import image_mass, mass_curve
from cacheplan.profilers.merge_damage import Folded, folded_contexts, merge_damage
from cacheplan.profilers.quantization import BitMenu, bit_statistics
from cacheplan.profilers.retrieval import Needles, retrieval_score
from cacheplan.scorers.preference import window_dispersion_and_shift
from cacheplan.scorers.scores import Rotary, Seen
from cacheplan.types import KVAction, ProbeAttention, needs_rotary


@dataclass(frozen=True)
class Menu:
    """What is measured: every candidate at every keep fraction, and what few bits do."""

    candidates: tuple[KVAction, ...]
    keeps: tuple[float, ...]
    bits: BitMenu | None = None


@dataclass(eq=False)
class LayerRecord:
    """One layer's statistics of one prompt, and what the ablation needs to replay it."""

    statistics: dict[str, NDArray[np.float64]]  # without the axis "layer"
    outcomes: list[Nested | Folded] | None = None  # of every candidate
    key: Tensor | None = None  # [1, K, C, D]
    value: Tensor | None = None


class Observer(AttendingLayer):
    """Attends like the stock model and hands the statistics of its layer to `sink`.

    Only the queries, keys and values of the layer at hand are alive at any time, unless
    `remember` asks for the context's cache.  Where later layers read these keys too, tokens are
    ranked by the first one's queries, and the damage is that of all of them.  `pictured` `[C]`
    (bool) are the context's image tokens.
    """

    def __init__(
        self,
        context: int,
        menu: Menu,
        needles: Needles | None = None,
        *,
        remember: bool,
        sink: Callable[[LayerRecord], None],
        readers: int = 1,
        probed: Mapping[ProbeAttention, Tensor] | None = None,
        pictured: Tensor | None = None,
    ) -> None:
        super().__init__(readers)
        self.context, self.menu, self.needles = context, menu, needles
        self.probed, self.pictured = probed or {}, pictured
        self.remember, self.sink = remember, sink
        self._record: LayerRecord | None = None

    def receive(self, key: Tensor, value: Tensor) -> None:
        self._key, self._value = key, value

    def attend(self, step: Step) -> Tensor:
        key, value, C = self._key, self._value, self.context
        output = causal_attention(step, key, value)
        if self._record is None:
            self._record = self._observed(step, output)
        record = self._record
        assert record.outcomes is not None
        found = {"damage": _damage(step, C, key, value, record.outcomes)}
        if self.menu.bits is not None:
            found |= bit_statistics(
                step, C, key, value, self.menu.candidates, record.outcomes, self.menu.bits
            )
        for name, damage in found.items():
            record.statistics[name] = record.statistics.get(name, 0) + damage.cpu().numpy()
        if self.unread == 0:
            if self.remember:
                record.key, record.value = key[:, :, :C].clone(), value[:, :, :C].clone()
            else:
                record.outcomes = None
            del self._key, self._value
            self._record = None
            self.sink(record)
        return output

    def _observed(self, step: Step, output: Tensor) -> LayerRecord:
        """Every statistic but the damage."""
        key, value, query, scale = self._key, self._value, step.query, step.scale
        C, menu = self.context, self.menu
        seen = Seen(query[:, :, :C], key[:, :, :C], value[:, :, :C], scale, probed=self.probed)
        if self.pictured is not None:
            seen = replace(seen, images=self.pictured[None])
        if any(needs_rotary(candidate.scorer) for candidate in menu.candidates):
            seen = replace(seen, rotary=Rotary(*rotary_frequencies(step.module, C, key.device)))
        counts = kept_counts(menu.keeps, C)
        dispersion, shift = window_dispersion_and_shift(seen)
        found = {
            "mass_curve": mass_curve(seen.query, seen.key, scale=scale),
            "output_energy": output_energy(output[:, C:], key.shape[1]),
            "window_dispersion": np.array(dispersion),
            "window_shift": np.array(shift),
            "spectral_residual": np.array(spectral_residual(seen.key, seen.value)),
        }
        if self.pictured is not None:
            found["image_mass"] = np.array(image_mass(query[:, :, C:], key, self.pictured, scale))
        if self.needles is not None:
            found["retrieval_score"] = retrieval_score(query, key, self.needles, scale=scale)
        return LayerRecord(found, [_outcome(c, seen, counts) for c in menu.candidates])


def _outcome(action: KVAction, seen: Seen, counts: list[int]) -> Nested | Folded:
    if action.merge is not None:
        return folded_contexts(action, seen, counts)
    return nested_sets(action, seen, counts)


def _damage(
    step: Step, context: int, key: Tensor, value: Tensor, outcomes: Sequence[Nested | Folded]
) -> Tensor:
    """Damage of every candidate `[K, A, G]`."""
    query = step.query[:, :, context:]
    how: Any = {"scale": step.scale, "sinks": step.sinks, "softcap": step.softcap}
    nested = [outcome for outcome in outcomes if isinstance(outcome, Nested)]
    dropped = iter(eviction_damage(query, key, value, nested, **how).unbind(1) if nested else ())
    found = [
        next(dropped)
        if isinstance(outcome, Nested)
        else merge_damage(query, key, value, outcome, **how)
        for outcome in outcomes
    ]
    return torch.stack(found, dim=1)


class BlockReader(AttendingLayer):
    """Reads a context again in blocks and notes how far its layer's keys move.

    `pattern` `[1, C, C]` (bool) says which tokens see each other; `record.statistics` gets
    "block_distance" (EpiCache, arXiv 2509.17396).
    """

    def __init__(self, record: LayerRecord, pattern: Tensor, readers: int = 1) -> None:
        super().__init__(readers)
        self.record, self.pattern = record, pattern

    def receive(self, key: Tensor, value: Tensor) -> None:
        assert self.record.key is not None
        self.record.statistics["block_distance"] = np.array(key_distance(self.record.key, key))
        self._key, self._value = key, value

    def attend(self, step: Step) -> Tensor:
        return causal_attention(replace(step, pattern=self.pattern), self._key, self._value)


class Ablation(AttendingLayer):
    """Replays the continuation over a stored context, with some context keys hidden.

    `hidden` `[B, K, C]` bool hides context tokens of this layer, a different set for each batch
    entry; None hides nothing.
    """

    def __init__(self, record: LayerRecord, hidden: Tensor | None, readers: int = 1) -> None:
        super().__init__(readers)
        assert record.key is not None
        assert record.value is not None
        self.hidden, self.seen = hidden, record.key.shape[2]
        self._key, self._value = record.key, record.value

    def receive(self, key: Tensor, value: Tensor) -> None:
        B = key.shape[0]
        self._key = torch.cat([self._key.expand(B, -1, -1, -1), key], dim=2)
        self._value = torch.cat([self._value.expand(B, -1, -1, -1), value], dim=2)

    def attend(self, step: Step) -> Tensor:
        if self.hidden is None:
            return causal_attention(step, self._key, self._value)
        B, K, S, _ = self._key.shape
        bias = torch.zeros(B, K, S, device=step.query.device)
        bias[:, :, : self.hidden.shape[2]].masked_fill_(self.hidden, float("-inf"))
        output = ragged_attention(
            step.query,
            self._key.reshape(B * K * S, -1),
            self._value.reshape(B * K * S, -1),
            offsets=range(0, B * K * S, S),
            lengths=[S] * (B * K),
            scale=step.scale,
            bias=bias.flatten(),
            sinks=step.sinks,
            softcap=step.softcap,
        )
        return output.transpose(1, 2).contiguous()


def hidden_tokens(record: LayerRecord, probes: Sequence[tuple[int, int]]) -> Tensor:
    """What each (kv head, probe) pair hides, as a batch: `[K * P, K, C]` bool.

    A probe is (candidate index, keep index).  Batch entry `h * P + p` evicts head h by probe p
    and leaves the layer's other heads whole.
    """
    assert record.key is not None
    assert record.outcomes is not None
    _, K, C, _ = record.key.shape
    hidden = torch.zeros(K, len(probes), K, C, dtype=torch.bool)
    for p, (candidate, keep) in enumerate(probes):
        nested = record.outcomes[candidate]
        assert isinstance(nested, Nested), "probes hide tokens, so they drop them"
        for h in range(K):
            hidden[h, p, h, nested.order[h, nested.counts[h][keep] :].cpu()] = True
    return hidden.flatten(0, 1).to(record.key.device)
