"""Read probe tokens behind a prompt that a cache holds, and leave the cache as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from cacheplan.adapters.attention import AttendingCache, AttendingLayer
from cacheplan.errors import UnsupportedError
from cacheplan.types import ProbeAttention, Scorer


@torch.no_grad()
def read_probe(
    decoder: Any, cache: AttendingCache, scorer: ProbeAttention, prompt: Mapping[str, Any]
) -> None:
    """Run the decoder on the tokens of a probe.

    `prompt` are the keyword arguments of the call that has filled the cache.  The attending layers
    see the probe's queries and must not store its keys; their length is set back here, and other
    layers work on copies, so that the next token finds everything as the prompt has left it.

    Raises UnsupportedError for prompts given in other ways, and where the probe would stand at
    positions that the model does not know.
    """
    own = list(cache.layers)
    attending = [layer for layer in own if isinstance(layer, AttendingLayer)]
    seen = [layer.seen for layer in attending]
    try:
        for call in _calls(decoder, scorer, prompt):
            cache.layers[:] = [
                layer if isinstance(layer, AttendingLayer) else deepcopy(layer) for layer in own
            ]
            decoder(**call, past_key_values=cache, use_cache=True)
            for layer, length in zip(attending, seen, strict=True):
                layer.seen = length
    finally:
        cache.layers[:] = own


def probe_fits(model: Any, scorer: Scorer, length: int) -> bool:
    """Whether a scorer's probe, if it has one, fits behind a text of that length."""
    if not isinstance(scorer, ProbeAttention):
        return True
    piece = min(scorer.tokens, length)
    longest = piece if scorer.content == "filler" else piece + len(scorer.ids)
    return length + longest <= _known_positions(model.get_decoder())


def _known_positions(decoder: Any) -> float:
    return getattr(decoder.config, "max_position_embeddings", None) or float("inf")


def _calls(
    decoder: Any, scorer: ProbeAttention, prompt: Mapping[str, Any]
) -> Iterator[dict[str, Tensor]]:
    """Arguments of the decoder's calls, texts of a batch padded on the left."""
    name = next((n for n in ("input_ids", "inputs_embeds") if prompt.get(n) is not None), None)
    mask = prompt.get("attention_mask")
    if name is None or (mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2)):
        raise UnsupportedError(
            "A plan that scores its prompt by probes needs input_ids=... by name and a mask of "
            "padding alone: solve with another recipe."
        )
    given = prompt[name]
    B, S = given.shape[:2]
    whole = given.new_ones(B, S, dtype=torch.bool) if mask is None else mask[:, :S].bool()
    lead = torch.tensor(scorer.ids, dtype=torch.long, device=given.device)
    if name == "inputs_embeds":
        lead = decoder.get_input_embeddings()(lead)
    texts = [entry[valid] for entry, valid in zip(given, whole, strict=True)]
    last = _last_positions(prompt.get("position_ids"), whole)  # [..., B]
    for pieces in _pieces(scorer, texts, lead):
        longest = max(map(len, pieces))
        probe = given.new_zeros(B, longest, *given.shape[2:])
        valid = whole.new_zeros(B, longest)
        for b, piece in enumerate(pieces):
            probe[b, longest - len(piece) :] = piece
            valid[b, longest - len(piece) :] = True
        place = last[..., None] + valid.cumsum(-1)
        known = _known_positions(decoder)
        if int(place.max()) >= known:
            raise UnsupportedError(
                f"The probe would stand at position {int(place.max())} of a model that knows "
                f"{known:.0f}: shorten the prompt, or solve with another recipe."
            )
        yield {
            name: probe,
            "attention_mask": torch.cat([whole, valid], dim=1).long(),
            "position_ids": place,
        }


def _pieces(scorer: ProbeAttention, texts: list[Tensor], lead: Tensor) -> Iterator[list[Tensor]]:
    """What is read of each text, call after call."""
    if scorer.content == "filler":
        yield [lead if len(lead) else text[-scorer.tokens :] for text in texts]
        return
    for start in range(0, max(map(len, texts)), scorer.tokens):
        parts = [text[start : start + scorer.tokens] for text in texts]
        yield [torch.cat([lead, part]) if len(part) else part for part in parts]


def _last_positions(position_ids: Tensor | None, whole: Tensor) -> Tensor:
    """Positions of the texts' last tokens, `[B]`, or `[n, B]` where a token has several."""
    B, S = whole.shape
    index = torch.arange(S, device=whole.device)
    last = torch.where(whole, index, -1).amax(-1)
    if position_ids is None:
        return last
    every = position_ids.expand(*position_ids.shape[:-2], B, S)
    return every[..., torch.arange(B, device=whole.device), last]
