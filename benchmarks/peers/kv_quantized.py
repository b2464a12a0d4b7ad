"""transformers' quantized caches: all layers alike, dequantized at every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from kv_measure import Arm, Held, stored_bytes
from torch import Tensor
from transformers import QuantizedCache

GROUP = 32  # the default of 64 needs even numbers of tokens here


def quantized(model: Any, bits: int) -> Any:
    """An empty cache of transformers in `bits` bits, by quanto."""
    return QuantizedCache("quanto", model.config, nbits=bits, q_group_size=GROUP)


def tokens_within(model: Any, bits: int, budget: float, length: int) -> int:
    """How many tokens of `length` fit into the budget when stored in so many bits."""
    share = _bytes_per_token(model, bits) / _full_bytes_per_token(model)
    return min(length, int(budget * length / share + 1e-9))


def quantized_arms() -> list[Arm]:
    """Caches that keep all tokens: their size is what it is, whatever the budget."""
    makes: dict[str, Callable[[Any], Any]] = {
        "fp8": lambda model: QuantizedCache("fp8", model.config),
        "hqq int4": lambda model: QuantizedCache(
            "hqq", model.config, nbits=4, axis_key=1, axis_value=1, q_group_size=GROUP
        ),
        "quanto int4": lambda model: quantized(model, 4),
        "quanto int2": lambda model: quantized(model, 2),
    }
    return [Arm(name, "transformers", _reader(make)) for name, make in makes.items()]


def _reader(make: Callable[[Any], Any]) -> Callable[[Any, Tensor], Held]:
    def read(model: Any, ids: Tensor) -> Held:
        cache = make(model)
        model.model(input_ids=ids, past_key_values=cache)
        return Held(cache)

    return read


def _full_bytes_per_token(model: Any) -> float:
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = 2 * config.num_hidden_layers * config.num_key_value_heads
    return float(rows * width * 2)  # in 16 bits


@lru_cache
@torch.no_grad()
def _bytes_per_token(model: Any, bits: int) -> float:
    cache = quantized(model, bits)
    ids = torch.zeros(1, 256, dtype=torch.long)
    model.model(input_ids=ids, past_key_values=cache)
    return stored_bytes(cache) / ids.shape[1]
