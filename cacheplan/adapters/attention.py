"""Step into a transformers model's attention: a cache layer that attends for itself.

transformers hands the attention function no cache, so the layer travels with the keys that its
`update` returns.  One registered function finds it there and lets it compute; keys without a
layer take the stock path, so anything outside a plan behaves as before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cacheplan.errors import UnsupportedError

IMPLEMENTATION = "cacheplan"
_LAYER = "_cacheplan_layer"


class AttendingLayer(CacheLayerMixin):  # type: ignore[misc]
    """A cache layer that computes the attention over what it holds.

    `seen` is the logical length: tokens that have passed, kept or not.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    @abstractmethod
    def attend(self, module: torch.nn.Module, query: Tensor, scale: float) -> Tensor:
        """Attend with `query` `[B, H, T, D]` right after `receive`; returns `[B, T, H, Dv]`."""

    @abstractmethod
    def receive(self, key: Tensor, value: Tensor) -> None:
        """Take the keys `[B, K, T, D]` and values of T new tokens."""

    def update(
        self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        self.receive(key, value)
        self.seen += key.shape[2]
        setattr(key, _LAYER, self)
        return key, value

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # logical sizes: the mask serves to notice padding; the layer masks what it holds itself
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise UnsupportedError(
            "Beam search over a planned cache is not supported yet: use num_beams=1."
        )

    def crop(self, tokens_to_remove: int) -> None:
        raise UnsupportedError(
            "A planned cache cannot be cropped, which assisted decoding needs: "
            "generate without an assistant model."
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise UnsupportedError(
            "A planned cache cannot be repeated along the batch: repeat the prompts instead."
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        raise UnsupportedError(
            "A planned cache cannot drop batch entries: use num_return_sequences=1 per prompt."
        )


class AttendingCache(Cache):  # type: ignore[misc]
    """A list of attending layers, one per decoder layer."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    layer = getattr(key, _LAYER, None)
    if layer is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UnsupportedError(
            "Attention with soft-capped logits or learned sinks cannot run a cache plan yet."
        )
    delattr(key, _LAYER)  # the layer may hold a view of these keys: no cycle must remain
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return layer.attend(module, query, scale), None


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UnsupportedError(
            "Padded batches cannot run a cache plan yet: call the model once per prompt length."
        )
    mask: Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    return mask


def causal_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Run transformers' own SDPA path on keys whose last T tokens are the queries' own.

    The same calls on the same shapes as the stock model, hence the same bits.
    """
    T, S = query.shape[2], key.shape[2]
    mask = None
    if 1 < T < S:
        last = torch.arange(S - T, S, device=key.device)
        mask = (torch.arange(S, device=key.device) <= last[:, None])[None, None]
    output, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scale)
    assert isinstance(output, Tensor)
    return output


def check_attention(model: Any) -> None:
    """Raise UnsupportedError unless the model runs stock SDPA attention, with no plan applied."""
    running = model.config._attn_implementation
    if running == IMPLEMENTATION:
        raise UnsupportedError(
            "A plan is already applied to this model: leave that `with` block first."
        )
    if running != "sdpa":
        raise UnsupportedError(
            f'The model runs attention "{running}", but plans need "sdpa": '
            'load it with attn_implementation="sdpa".'
        )


@contextmanager
def attending(model: Any) -> Iterator[None]:
    """Route the model's attention through cache layers; restore it on leaving."""
    check_attention(model)
    # additive and idempotent: no existing implementation is touched
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
