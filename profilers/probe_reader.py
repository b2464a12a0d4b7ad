"""What probes behind a context find, measured as the runtime does it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cacheplan.adapters.attention import AttendingCache, AttendingLayer, Step, causal_attention
from cacheplan.adapters.decoder import text_decoder
from cacheplan.adapters.images import Images, read
from cacheplan.adapters.language import readers
from cacheplan.adapters.probe_tokens import read_probe
from cacheplan.profilers.observer import Menu
from cacheplan.scorers.probe import joined, paid
from cacheplan.types import ProbeAttention

Probed = dict[ProbeAttention, Tensor]  # [1, K, C] each


def read_probes(
    model: Any, context: Tensor, planned: list[int], menu: Menu, images: Images | None = None
) -> dict[int, Probed]:
    """Scores of the context `[1, C]` (with `images`) by every probe of the menu, per planned layer.

    Reads the context once more, and holds its whole cache meanwhile; nothing is read where no
    candidate has a probe.
    """
    scorers = dict.fromkeys(candidate.scorer for candidate in menu.candidates)
    probes = [scorer for scorer in scorers if isinstance(scorer, ProbeAttention)]
    if not probes:
        return {}
    layers, shared = DynamicCache(config=model.config).layers, readers(model)
    found = {index: _ProbeReader(shared[index]) for index in planned}
    for index, layer in found.items():
        layers[index] = layer
    cache = AttendingCache(layers)
    prompt = read(model, context, cache, images)
    for scorer in probes:
        for layer in found.values():
            layer.probe = scorer
        read_probe(text_decoder(model), cache, scorer, prompt)
    return {index: layer.probed for index, layer in found.items()}


class _ProbeReader(AttendingLayer):
    """Stores the first call, and scores it by the tokens of every later one."""

    def __init__(self, readers: int) -> None:
        super().__init__(readers)
        self.probe: ProbeAttention | None = None
        self.probed: Probed = {}

    def receive(self, key: Tensor, value: Tensor) -> None:
        if self.probe is None:
            self._key, self._value = key, value
        self._fresh = key, value

    def attend(self, step: Step) -> Tensor:
        if self.probe is None:
            return causal_attention(step, self._key, self._value)
        key = torch.cat([self._key, self._fresh[0]], dim=2)
        value = torch.cat([self._value, self._fresh[1]], dim=2)
        if self.unread == self.readers - 1:  # tokens are ranked by the layer's own queries
            found = paid(self.probe, step.query, key, scale=step.scale)
            self.probed[self.probe] = joined(self.probe, self.probed.get(self.probe), found)
        return causal_attention(step, key, value)
