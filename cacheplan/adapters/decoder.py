"""Where a model's text decoder is, whatever stands around it."""

from __future__ import annotations

from typing import Any


def text_decoder(model: Any) -> Any:
    """The module from token embeddings to last hidden states, without vision tower and head."""
    decoder = model.get_decoder()
    while getattr(decoder, "lm_head", None) is not None:  # some answer with a model with a head
        decoder = decoder.model
    return decoder
