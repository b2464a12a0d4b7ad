"""One token through a model: what its planned layers store, and whether plans can run on it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cacheplan.adapters.attention import (
    IMPLEMENTATION,
    AttendingCache,
    AttendingLayer,
    Step,
    attending,
    causal_attention,
)
from cacheplan.adapters.decoder import text_decoder
from cacheplan.adapters.offloading import input_device
from cacheplan.errors import UnsupportedError

_ALIKE = 0.05  # relative distance between two ways of computing the same, in coarse types too
Shapes = tuple[torch.Size, torch.Size]


class _Probe(AttendingLayer):
    """Counts who attends with its keys, however many."""

    key: Tensor | None = None
    calls = 0

    def __init__(self) -> None:
        super().__init__(readers=1 << 30)

    def receive(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value

    def attend(self, step: Step) -> Tensor:
        assert self.key is not None
        self.calls += 1
        return causal_attention(step, self.key, self.value)


@torch.no_grad()
def stored_shapes(model: Any, planned: list[int], readers: list[int]) -> Shapes:
    """Shapes of the planned layers' keys and values of one token.

    `readers` layers are expected to attend with each layer's keys.  Raises UnsupportedError if
    shapes differ from layer to layer, or if attention does not come to the cache as plans need
    it: through transformers' attention interface, with the very keys that the cache returned, and
    causal.
    """
    name = type(model).__name__
    layers = DynamicCache(config=model.config).layers
    probes = {index: _Probe() for index in planned}
    for index, probe in probes.items():
        layers[index] = probe
    token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    applied = text_decoder(model).config._attn_implementation == IMPLEMENTATION
    with nullcontext() if applied else attending(model):
        try:
            text_decoder(model)(
                input_ids=token, past_key_values=AttendingCache(layers), use_cache=True
            )
        except ValueError as error:  # some models demand a cache class of their own
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise UnsupportedError(
                f"{name} does not run over transformers' own cache ({reason}), so plans cannot "
                "run on it."
            ) from error
    for index, probe in probes.items():
        if probe.calls != readers[index]:
            raise UnsupportedError(
                f"{probe.calls} layers of {name} attend with the keys that the cache returned to "
                f"layer {index}, expected {readers[index]}, so plans cannot run on it."
            )
    shapes = {(p.key.shape, p.value.shape) for p in probes.values() if p.key is not None}
    if len(shapes) > 1:
        raise UnsupportedError(
            f"{name} stores keys and values of different shapes in different full-attention "
            "layers, which plans cannot describe yet."
        )
    return shapes.pop()


@torch.no_grad()
def continues_at_once(model: Any) -> bool:
    """Whether recurrent layers go on from their states when a later call brings several tokens.

    Some go on with single tokens only.  Raises UnsupportedError if a model does not even do that,
    so that nothing behind a prompt can be measured.
    """
    if not any(DynamicCache(config=model.config).is_linear):
        return True
    decoder = text_decoder(model)
    ids = torch.arange(1, 13, device=input_device(model))[None]
    whole = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, 6:].float()
    for size in (6, 1):
        cache, found = DynamicCache(config=model.config), []
        for part in [ids[:, :6], *torch.split(ids[:, 6:], size, dim=1)]:
            read = decoder(input_ids=part, past_key_values=cache, use_cache=True)
            found.append(read.last_hidden_state.float())
        if (torch.cat(found, 1)[:, 6:] - whole).norm() < _ALIKE * whole.norm():
            return size > 1
    raise UnsupportedError(
        f"{type(model).__name__} continues a text otherwise than it reads it at once, so that "
        "damage to it cannot be measured: plan for another model."
    )
