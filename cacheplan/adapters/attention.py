"""Step into a transformers model's attention: a cache layer that attends for itself.

transformers hands the attention function no cache, so the layer travels with the keys that its
`update` returns.  One registered function finds it there and lets it compute; keys without a
layer take the stock path, so anything outside a plan behaves as before.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from cacheplan.adapters.decoder import text_decoder
from cacheplan.errors import UnsupportedError
from cacheplan.kernels.ragged_attention.naive import ragged_attention

IMPLEMENTATION = "cacheplan"
_LAYER = "_cacheplan_layer"
_UNKNOWN = ("position_bias", "indices", "block_indices", "sinks")  # what some models also pass


@dataclass(frozen=True, eq=False)
class Step:
    """One attention call over T new tokens.

    `query` `[B, H, T, D]`.  `valid` holds, per batch entry, the ascending indices of the new
    tokens that are not padding (None: all are).  `pattern` `[B, T, T]` (bool) says which new
    tokens see each other where that is not simply causal, as within images.  `sinks` `[H]` are
    learned logits without a value, and `softcap` bounds the logits (see `ragged_attention`).
    """

    module: torch.nn.Module
    query: Tensor
    scale: float
    valid: list[Tensor] | None = None
    pattern: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float | None = None


class AttendingLayer(CacheLayerMixin):  # type: ignore[misc]
    """A cache layer that computes the attention over what it holds.

    `seen` is the logical length: tokens that have passed, kept or not, padding included.
    `readers` attention modules use the layer in every forward call (more than one where later
    layers share its keys).
    """

    is_sliding = False

    def __init__(self, readers: int = 1) -> None:
        super().__init__()
        self.seen = 0
        self.readers = readers
        self.unread = 0  # readers that are still to come in this forward call

    @abstractmethod
    def attend(self, step: Step) -> Tensor:
        """Attend right after `receive`; returns `[B, T, H, Dv]`."""

    @abstractmethod
    def receive(self, key: Tensor, value: Tensor) -> None:
        """Take the keys `[B, K, T, D]` and values of T new tokens."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # storage is not traced
    def update(
        self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        self.receive(key, value)
        self.seen += key.shape[2]
        self.unread = self.readers
        setattr(key, _LAYER, self)
        return key, value

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # logical sizes: the mask tells padding; the layer masks what it holds itself
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1


class AttendingCache(Cache):  # type: ignore[misc]
    """A list of cache layers, one per decoder layer; those of planned layers attend."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the layer chooses by what it holds
def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = getattr(key, _LAYER, None)
    if layer is None:
        mask = _widened(attention_mask, query.shape[2], key.shape[2])
        if s_aux is not None or softcap is not None:
            return _explicit(query, key, value, mask, scale, s_aux, softcap), None
        output, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    _refuse(module, kwargs)
    layer.unread -= 1
    if layer.unread == 0:
        delattr(key, _LAYER)  # the layer may hold a view of these keys: no cycle must remain
    valid, pattern = _reader.read(attention_mask, query.shape[2])
    return layer.attend(Step(module, query, scale, valid, pattern, s_aux, softcap)), None


def _refuse(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    odd = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if (kwargs.get("is_causal") is False) or not getattr(module, "is_causal", True):
        odd.append("attention in both directions")
    if odd:
        raise UnsupportedError(
            f"{type(module).__name__} attends with {odd[0]}, which a cache layer cannot do: plans "
            "are for causal attention by keys and values alone."
        )


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """None where nothing is padding, and one line `[B, 1, 1, S]` for causal masks with padding.

    A cache layer masks what it holds itself, so no `[T, S]` is ever made for plain causal
    attention.  Other patterns (windows, images) are transformers' own `[B, 1, T, S]`.
    """
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if (
        mask_function is causal_mask_function
        and kv_offset == 0
        and q_offset + q_length == kv_length
    ):
        return None if attention_mask is None else attention_mask[:, None, None, :kv_length].bool()
    mask: Tensor | None = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        **kwargs,
    )
    return mask


def _widened(mask: Tensor | None, new: int, length: int) -> Tensor | None:
    """The `[B, 1, T, S]` mask that the stock attention expects."""
    if new == 1 or (mask is not None and mask.shape[-2] > 1):
        return mask
    if mask is None and new == length:
        return None  # stock attention takes this for causal
    device = None if mask is None else mask.device
    last = torch.arange(length - new, length, device=device)
    causal = torch.arange(length, device=device) <= last[:, None]
    # a query that is padding sees itself: a softmax over nothing would be NaN
    own = torch.eye(length, dtype=torch.bool, device=device)[length - new :]
    return causal[None, None] if mask is None else (causal & mask) | own


Reading = tuple[list[Tensor] | None, Tensor | None]


class _Reader:
    """Reads the mask of the forward call under way once: all layers get the same tensor."""

    def __init__(self) -> None:
        # replaced as a whole, so that threads never see one mask with another's reading
        self._last: tuple[weakref.ref[Tensor], int, Reading] | None = None

    def read(self, mask: Tensor | None, new: int) -> Reading:
        """Valid new tokens per batch entry, and their pattern; see `Step`."""
        if mask is None:
            return None, None
        last = self._last
        if last is not None and last[0]() is mask and last[1] == new:
            return last[2]
        own = mask[:, 0, :, -new:]
        valid = own.any(1)
        tokens = None if bool(valid.all()) else [entry.nonzero()[:, 0] for entry in valid]
        found = tokens, own if own.shape[1] == new > 1 else None
        self._last = weakref.ref(mask), new, found
        return found


_reader = _Reader()


def causal_attention(step: Step, key: Tensor, value: Tensor) -> Tensor:
    """Attend to keys `[B, K, S, D]` whose last T tokens are the queries' own.

    Without padding, sinks or gaps these are the stock model's calls on the same shapes, hence the
    same bits.  Padding is left out entry by entry, so that a padded text gets what it gets alone.
    """
    T, S = step.query.shape[2], key.shape[2]
    if step.valid is not None:
        return _each_alone(step, key, value)
    if step.sinks is not None or step.softcap is not None:
        return _over_rows(step, key, value)
    mask = None
    if step.pattern is not None:
        old = step.pattern.new_ones(*step.pattern.shape[:2], S - T)
        mask = torch.cat([old, step.pattern], dim=-1)[:, None]
    elif 1 < T < S:
        last = torch.arange(S - T, S, device=key.device)
        mask = (torch.arange(S, device=key.device) <= last[:, None])[None, None]
    output, _ = sdpa_attention_forward(
        step.module, step.query, key, value, mask, scaling=step.scale
    )
    assert isinstance(output, Tensor)
    return output


def _each_alone(step: Step, key: Tensor, value: Tensor) -> Tensor:
    assert step.valid is not None
    B, H, T, _ = step.query.shape
    out = step.query.new_zeros(B, T, H, value.shape[-1])
    old = torch.arange(key.shape[2] - T, device=key.device)
    for b, tokens in enumerate(step.valid):
        if len(tokens) == 0:
            continue
        places = torch.cat([old, tokens + key.shape[2] - T])
        pattern = None if step.pattern is None else step.pattern[b : b + 1, tokens][:, :, tokens]
        query = step.query[b : b + 1, :, tokens]
        alone = replace(step, query=query, valid=None, pattern=pattern)
        found = causal_attention(alone, key[b : b + 1, :, places], value[b : b + 1, :, places])
        out[b, tokens] = found[0]
    return out


def _over_rows(step: Step, key: Tensor, value: Tensor) -> Tensor:
    B, K, S, _ = key.shape
    return ragged_attention(
        step.query,
        key.reshape(B * K * S, -1),
        value.reshape(B * K * S, -1),
        offsets=range(0, B * K * S, S),
        lengths=[S] * (B * K),
        scale=step.scale,
        pattern=step.pattern,
        sinks=step.sinks,
        softcap=step.softcap,
    ).transpose(1, 2)


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Attention with learned sinks or soft caps over a cache that is not planned (a window).

    transformers has it only in its eager form, which each model brings along.
    """
    G = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(G, 1).transpose(-1, -2) * scale  # [B, H, T, S]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None and query.shape[2] > 1:
        T, S = query.shape[2], key.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool, device=key.device).tril(S - T)
    if mask is not None:
        # not -inf: a query that is padding may see nothing, and must not become NaN
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1).to(logits)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.float().softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (weights @ value.repeat_interleave(G, 1)).transpose(1, 2).contiguous()


def stock_attention(decoder: Any) -> str:
    """Which of transformers' attentions plans stand in for: "sdpa", or "eager" where it lacks."""
    # some versions let SDPA run without the soft cap that the model was trained with
    capped = getattr(decoder.config, "attn_logit_softcapping", None) is not None
    return "sdpa" if decoder._supports_sdpa and not capped else "eager"


def check_attention(model: Any) -> str:
    """The attention that the model runs, which is its `stock_attention`.

    Raises UnsupportedError for any other, and if a plan is applied already.
    """
    decoder = text_decoder(model)
    running: str = decoder.config._attn_implementation
    if running == IMPLEMENTATION:
        raise UnsupportedError(
            "A plan is already applied to this model: leave that `with` block first."
        )
    if running != (stock := stock_attention(decoder)):
        raise UnsupportedError(
            f'The model runs attention "{running}", but plans need "{stock}": '
            f'load it with attn_implementation="{stock}".'
        )
    return running


@contextmanager
def attending(model: Any) -> Iterator[None]:
    """Route the decoder's attention through cache layers; restore it on leaving.

    A vision tower keeps its own.
    """
    running = check_attention(model)
    # additive and idempotent: no existing implementation is touched
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    decoder = text_decoder(model)
    decoder.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        decoder.set_attn_implementation(running)
