"""Read a context once for all our arms.

A plan evicts after attention, so that until then every plan's cache is handed the same queries,
keys and values.  They are noted when the first cache of a context is filled, and handed to the
others' layers through the same attention function, without the rest of the model.  Probes read
behind the prompt see the whole cache and are shared in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cacheplan.adapters.attention import IMPLEMENTATION
from cacheplan.runtime import layer
from cacheplan.runtime.cache import PlanCache

_CONTEXTS = 2  # that are remembered: a prompt's, and its context with the question in it


@dataclass(frozen=True)
class _Call:
    """One attention call: its module, what it was handed and what it gave."""

    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]
    output: Tensor


class Contexts:
    """The contexts that one decoder has read last."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self.known: dict[tuple[int, ...], dict[tuple[int, ...], list[_Call]]] = {}

    @torch.no_grad()
    def read(self, cache: PlanCache, ids: Tensor) -> None:
        """Fill an empty cache with a context `[1, C]` and evict, as the decoder's call would.

        Takes place where the plan is followed, if that reads its prompt at once.
        """
        context = tuple(ids[0].tolist())
        passes = self.known.setdefault(context, {})
        while len(self.known) > _CONTEXTS:
            del self.known[next(iter(self.known))]
        reader = _Reader(self.decoder, passes)
        reader(input_ids=ids, past_key_values=cache)
        cache.read_probes(reader, {"input_ids": ids})


@dataclass(frozen=True)
class _Reader:
    """Stands in for a decoder that reads a context, and behind it probes, time and again."""

    decoder: Any
    passes: dict[tuple[int, ...], list[_Call]]

    @property
    def config(self) -> Any:
        return self.decoder.config

    def __call__(self, *, input_ids: Tensor, past_key_values: PlanCache, **rest: Any) -> None:
        # the context itself may come again as a probe, at other places: so its length counts
        key = past_key_values.get_seq_length(), *input_ids[0].tolist()
        if key in self.passes:
            _replay(self.passes[key], past_key_values)
            return
        calls = list[_Call]()
        with _noting(calls):  # `forward`: hooks of the applied plan would read the probes
            self.decoder.forward(input_ids=input_ids, past_key_values=past_key_values, **rest)
        self.passes[key] = calls


def _replay(calls: list[_Call], cache: PlanCache) -> None:
    attend = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
    for call in calls:
        key, value = cache.update(call.key.clone(), call.value.clone(), call.module.layer_idx)
        # layers score and evict as always; what dense attention would give them is known
        with patch.object(layer, "causal_attention", return_value=call.output):
            attend(call.module, call.query, key, value, call.mask, **call.options)


@contextmanager
def _noting(calls: list[_Call]) -> Iterator[None]:
    """Note every attention call of planned models."""
    attend = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]

    def note(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        own = key.clone(), value.clone()
        output, weights = attend(module, query, key, value, mask, **options)
        calls.append(_Call(module, query, *own, mask, options, output))
        return output, weights

    AttentionInterface.register(IMPLEMENTATION, note)
    try:
        yield
    finally:
        AttentionInterface.register(IMPLEMENTATION, attend)
