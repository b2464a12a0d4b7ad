"""Run a continuation over caches that hold its context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cacheplan.adapters.attention import AttendingCache
from cacheplan.adapters.images import call_arguments
from cacheplan.profilers.prompts import Prompt


def replay(
    model: Any, prompt: Prompt, ids: Tensor, layers: list[Any], *, batch: int, at_once: int
) -> Tensor:
    """Logits of the continuation's tokens but the last, `[batch, T - 1, V]`.

    `ids` `[1, C + T]` is the whole text, `layers` the cache layers after its context for `batch`
    copies of it.  At most `at_once` tokens go through in one call.
    """
    context, end = len(prompt.context), ids.shape[1]
    cache, found = AttendingCache(layers), []
    for start in range(context, end, at_once):
        part = ids[:, start : start + at_once].expand(batch, -1)
        beside = call_arguments(model, prompt.images, start, start + part.shape[1])
        out = model(input_ids=part, past_key_values=cache, use_cache=True, **beside)
        found.append(out.logits)
    return torch.cat(found, dim=1)[:, :-1]
