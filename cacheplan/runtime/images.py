"""Tell a planned cache which tokens of a prompt stand for images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from cacheplan.adapters.decoder import text_decoder
from cacheplan.adapters.images import image_token
from cacheplan.runtime.cache import PlanCache


@contextmanager
def images_in_prompts(model: Any) -> Iterator[None]:
    """Read image tokens off the `input_ids` of every call that fills an empty `PlanCache`.

    The model around the decoder replaces them by embeddings, so they are noted before that.
    """
    decoder = text_decoder(model)
    if image_token(model.config) is None or decoder is model:
        yield
        return
    noted: tuple[Any, Any] = None, None  # ids and mask of the call under way

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal noted
        noted = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")

    def tell(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal noted
        (ids, mask), noted = noted, (None, None)
        if kwargs.get("input_ids") is not None:  # a text for the decoder alone
            ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        cache = kwargs.get("past_key_values")
        if isinstance(cache, PlanCache) and cache.get_seq_length() == 0 and ids is not None:
            plain = isinstance(mask, Tensor) and mask.ndim == 2
            cache.show(ids, mask[:, -ids.shape[1] :].bool() if plain else None)

    hooks = [
        model.register_forward_pre_hook(note, with_kwargs=True),
        decoder.register_forward_pre_hook(tell, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
