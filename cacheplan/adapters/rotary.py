"""The rotary embedding of an attention module, read off the model's own code."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from cacheplan.adapters.decoder import text_decoder
from cacheplan.errors import UnsupportedError

_HALVES, _NEIGHBOURS = [-2.0, -3.0, 0.0, 1.0], [-1.0, 0.0, -3.0, 2.0]  # rotate_half(0 1 2 3)


def rotary_frequencies(
    module: torch.nn.Module, length: int, device: torch.device
) -> tuple[Tensor, bool]:
    """Radians per position of the channel pairs `[R]`, and whether pairs are neighbours.

    `length` is that of the text, on which some rules for long texts depend.  The class that
    computes the model's frequencies is asked, so every rule of transformers is followed;
    the layout of the pairs is seen from what the model's `rotate_half` does.  Empty where the
    layer rotates nothing.  UnsupportedError where this cannot be told.
    """
    home = vars(sys.modules[type(module).__module__])
    found = _frequencies(home, getattr(module, "config", None), length, device)
    turned = home["rotate_half"](torch.arange(4.0)).tolist() if "rotate_half" in home else None
    if found is None or turned not in (_HALVES, _NEIGHBOURS):
        raise UnsupportedError(
            f"How {type(module).__name__} rotates its queries is not known, which the scorer "
            "expected_attention needs: solve with another recipe."
        )
    if not getattr(module, "use_rope", True):
        return found[:0], False
    return found, turned == _NEIGHBOURS


def _frequencies(
    home: dict[str, Any], config: Any, length: int, device: torch.device
) -> Tensor | None:
    """What the only rotary embedding of a model's file computes; None if that is not plain.

    Positions in several dimensions and rules that differ between layers are not plain.
    """
    kinds = [
        thing
        for word, thing in home.items()
        if word.endswith("RotaryEmbedding")
        and "Vision" not in word
        and isinstance(thing, type)
        and thing.__module__ == home["__name__"]
    ]
    parameters = getattr(config, "rope_parameters", None) or {}
    layers = set(getattr(config, "layer_types", None) or [None])
    if len(kinds) != 1 or len(layers) != 1 or "mrope_section" in parameters:
        return None
    try:
        embedding = kinds[0](config).to(device)
        # dynamic rules choose their frequencies when they are called
        embedding(torch.zeros(1, device=device), torch.tensor([[length - 1]], device=device))
        return embedding.inv_freq.float()  # type: ignore[no-any-return]
    except (TypeError, AttributeError, KeyError):  # an embedding of another make
        return None


def rotary_known(model: Any) -> bool:
    """Whether the rotation can be told in all attention modules of the decoder."""
    modules = text_decoder(model).modules()
    try:
        for module in (m for m in modules if type(m).__name__.endswith("Attention")):
            rotary_frequencies(module, 1, torch.device("cpu"))
    except UnsupportedError:
        return False
    return True
