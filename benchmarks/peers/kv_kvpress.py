"""kvpress' arms.  Importing kvpress patches every attention function, so this has its own process.

kvpress counts what is removed; here a budget is what stays, to the token.  Its budgets per head
(AdaKV, KVzip, DuoAttention, LU-KV) mask keys that stay stored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import kvpress  # type: ignore[import-not-found]
import numpy as np
import torch
from kv_measure import Arm, Held
from kv_quantized import quantized, tokens_within
from kv_shared import prefill, ranked_once, zip_scores
from kvpress.presses import duo_attention_press  # type: ignore[import-not-found]
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

WINDOW = 16  # of SnapKV's scores beside the default of 64, which exceeds small budgets here
logging.getLogger("kvpress").setLevel(logging.ERROR)  # one warning per prompt, said in the notes

Shares = Callable[[int], list[list[int]]]  # our tokens per layer and head, for a context's length


@dataclass(frozen=True)
class Amount:
    """What may stay of one context: `tokens` per head of `length`, or `rows` of all heads."""

    tokens: int
    length: int
    rows: int

    @property
    def removed(self) -> float:
        """The `compression_ratio` for which kvpress keeps exactly `tokens`, whichever it rounds."""
        return 1 - (self.tokens + 0.25) / self.length


Make = Callable[[Any, Amount], Any]  # (model, amount) -> press


def _scorer(kind: Any, **options: Any) -> Make:
    return lambda model, amount: kind(compression_ratio=amount.removed, **options)


def _around(kind: Any, inner: Make, **options: Any) -> Make:
    return lambda model, amount: kind(inner(model, amount), **options)


_SNAPKV = _scorer(kvpress.SnapKVPress, window_size=WINDOW)
_KEYDIFF = _scorer(kvpress.KeyDiffPress)
_EXPECTED = _scorer(kvpress.ExpectedAttentionPress, epsilon=1e-2)
_EXPECTED_BARE = _scorer(kvpress.ExpectedAttentionPress, use_vnorm=False)


def _chunks(inner: Make) -> Make:
    """ChunkKV, which keeps whole chunks: as many as fit, shorter ones where not even one does."""

    def make(model: Any, amount: Amount) -> Any:
        size = min(20, amount.tokens)
        chunks = -(-amount.length // size)
        press = kvpress.ChunkKVPress(inner(model, amount), chunk_length=size)
        press.compression_ratio = 1 - (amount.tokens // size + 0.25) / chunks
        return press

    return make


def _zip(model: Any, amount: Amount, **options: Any) -> Any:
    heads, layers = model.config.num_key_value_heads, model.config.num_hidden_layers
    every, kept = layers * heads * amount.length, amount.rows
    removed = (every - kept + 0.25) / every  # KVzip rounds what it removes down
    return kvpress.KVzipPress(compression_ratio=removed, **options)


class _Duo(kvpress.DuoAttentionPress):  # type: ignore[misc]
    """DuoAttention with as many retrieval heads as fit beside streaming heads of `least` tokens."""

    def __init__(self, amount: Amount, texts: list[str], sinks: int = 4, least: int = 20) -> None:
        super().__init__(on_the_fly_scoring=True)
        self.amount, self.texts, self.sinks, self.least = amount, texts, sinks, least

    def post_init_from_model(self, model: Any) -> None:
        heads = model.config.num_hidden_layers * model.config.num_key_value_heads
        least = min(self.least, self.amount.tokens)
        spare = self.amount.rows - heads * least
        whole = spare // (self.amount.length - least)
        streaming = (self.amount.rows - whole * self.amount.length) // (heads - whole)
        self.head_compression_ratio = (heads - whole) / heads
        with _texts_for_duo(self.texts):
            super().post_init_from_model(model)
        self.sink_size, self.recent_size = self.sinks, streaming - self.sinks


@contextmanager
def _texts_for_duo(texts: list[str]) -> Iterator[None]:
    """Give DuoAttention's scoring the calibration texts in place of BookSum's chapters."""
    from datasets import Dataset  # type: ignore[import-not-found]

    repeated = [texts[i % len(texts)] for i in range(50)]  # as many as it samples
    original = duo_attention_press.load_dataset
    duo_attention_press.load_dataset = lambda *_, **__: Dataset.from_dict({"chapter": repeated})
    try:
        yield
    finally:
        duo_attention_press.load_dataset = original


def _layers_of_ours(inner: Make, shares: Shares) -> Make:
    """A peer's scores under our share of every layer."""

    def make(model: Any, amount: Amount) -> Any:
        mean = np.asarray(shares(amount.length)).mean(1)
        kept = np.maximum(1, np.floor(mean))
        for layer in np.argsort(kept - mean, kind="stable")[: int(mean.sum() - kept.sum())]:
            kept[layer] += 1
        ratios = [1 - (tokens + 0.25) / amount.length for tokens in kept]
        return kvpress.PerLayerCompressionPress(inner(model, amount), ratios)

    return make


def _heads_of_ours(inner: Make, shares: Shares) -> Make:
    """A peer's scores under our share of every head, through LU-KV's table."""

    def make(model: Any, amount: Amount) -> Any:
        press = kvpress.LUKVPress(inner(model, amount), compression_ratio=amount.removed)
        table = 1 - np.asarray(shares(amount.length), np.float64) / amount.length
        press._budget_curves = np.tile(table, (99, 1, 1))
        return press

    return make


def peer_arms(budget: float, shares: Shares, texts: list[str]) -> list[Arm]:
    """Every arm under one budget; `texts` are calibration texts."""
    arm = partial(_arm, budget)
    masks = "masks keys that stay stored"
    layers = "lengths differ by layer"
    return [
        arm("Random", _scorer(kvpress.RandomPress, seed=0)),
        arm("StreamingLLM", _scorer(kvpress.StreamingLLMPress)),
        arm("Knorm", _scorer(kvpress.KnormPress)),
        arm("KeyDiff", _KEYDIFF),
        arm("TOVA", _scorer(kvpress.TOVAPress)),
        arm("SnapKV", _scorer(kvpress.SnapKVPress)),
        arm(f"SnapKV (window {WINDOW})", _SNAPKV),
        arm("PyramidKV", _scorer(kvpress.PyramidKVPress), note=layers),
        arm("PyramidKV (window 8)", _scorer(kvpress.PyramidKVPress, window_size=8), note=layers),
        arm("ExpectedAttention", _scorer(kvpress.ExpectedAttentionPress)),
        arm("LagKV", _scorer(kvpress.LagKVPress)),
        arm("LagKV (lag 32)", _scorer(kvpress.LagKVPress, lag_size=32)),
        arm("ObservedAttention", _scorer(kvpress.ObservedAttentionPress), attention="eager"),
        arm("LeverageScore", _scorer(kvpress.LeverageScorePress)),
        arm("Compactor", _scorer(kvpress.CompactorPress)),
        arm("CUR", _scorer(kvpress.CURPress)),
        arm("ChunkKV (SnapKV)", _chunks(_SNAPKV)),
        arm("ChunkKV (KeyDiff)", _chunks(_KEYDIFF)),
        arm("CriticalKV (SnapKV)", _around(kvpress.CriticalKVPress, _SNAPKV)),
        arm("CriticalKV (Expected)", _around(kvpress.CriticalKVPress, _EXPECTED_BARE)),
        arm("Merging (KeyDiff)", _around(kvpress.MergingPress, _KEYDIFF)),
        arm("AdaKV (SnapKV)", _around(kvpress.AdaKVPress, _SNAPKV), note=masks),
        arm("AdaKV (KeyDiff)", _around(kvpress.AdaKVPress, _KEYDIFF), note=masks),
        arm("AdaKV (Expected)", _around(kvpress.AdaKVPress, _EXPECTED), note=masks),
        arm(
            "CriticalAdaKV (Expected)",
            _around(kvpress.CriticalAdaKVPress, _EXPECTED_BARE),
            note=masks,
        ),
        arm("KVzip", _zip, note=masks),
        arm("KVzip+", partial(_zip, kvzip_plus_normalization=True), note=masks),
        arm("DuoAttention", lambda _, amount: _Duo(amount, texts), note=masks),
        arm("SnapKV, our layer shares", _layers_of_ours(_SNAPKV, shares), note=layers),
        arm("KeyDiff, our layer shares", _layers_of_ours(_KEYDIFF, shares), note=layers),
        arm("Expected, our layer shares", _layers_of_ours(_EXPECTED, shares), note=layers),
        arm("KeyDiff, our head shares", _heads_of_ours(_KEYDIFF, shares), note=masks),
        arm("SnapKV, our head shares", _heads_of_ours(_SNAPKV, shares), note=masks),
        *(
            arm(f"{name} + quanto int{bits}", make, bits=bits)
            for bits in (4, 2)
            for name, make in (("KeyDiff", _KEYDIFF), ("SnapKV", _SNAPKV))
        ),
    ]


def _arm(
    budget: float,
    name: str,
    make: Make,
    *,
    note: str = "",
    attention: str = "sdpa",
    bits: int | None = None,
) -> Arm:
    def read(model: Any, ids: Tensor) -> Held:
        length, config = ids.shape[1], model.config
        rows = int(budget * length * config.num_hidden_layers * config.num_key_value_heads + 1e-9)
        tokens = max(1, int(budget * length + 1e-9))
        cache: Any = DynamicCache()
        if bits is not None:
            cache, tokens = quantized(model, bits), tokens_within(model, bits, budget, length)
        press = make(model, Amount(tokens, length, rows)) if tokens < length else None
        modules = [layer.self_attn for layer in model.model.layers]
        for module in modules:
            module.masked_key_indices = None  # of the arm before
        context = tuple(ids[0].tolist())
        zips = press if isinstance(press, kvpress.KVzipPress) else None  # all layers at once
        if press and not zips:
            with ranked_once(press, context, bits)(model):
                pass  # what entering makes: head scores, rotary embeddings of the modules
        for index, seen in enumerate(prefill(model, context, attention)):
            cache.update(seen.keys, seen.values, index)
            if press and not zips:
                kwargs = {**seen.kwargs, "past_key_values": cache}
                press.forward_hook(modules[index], [], kwargs, seen.output)
        if zips:
            scores = zip_scores(model, context, zips.kvzip_plus_normalization)
            for module in modules:
                module.masked_key_indices = None  # of the reading that has scored
            zips.score_val = scores.clone()
            zips.compress_post(model)
        return Held(cache, _unmasked_bytes(model, modules, cache))

    return Arm(name, "kvpress", read, at_once=_ragged, note=note)


def _unmasked_bytes(model: Any, modules: list[Any], cache: Any) -> int | None:
    """Bytes of the context's keys and values that are not masked; None if none is."""
    masks = [getattr(module, "masked_key_indices", None) for module in modules]
    if all(mask is None for mask in masks):
        return None
    rows: int = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers)
    rows -= sum(len(mask[0]) for mask in masks if mask is not None)
    return rows * 2 * int(modules[0].head_dim) * 2  # keys and values in 16 bits


@contextmanager
def _ragged(model: Any) -> Iterator[None]:
    """Let many tokens follow in one call, also where layers differ in length or keys are masked.

    The stock mask fits one length for all layers, and kvpress' fake keys need a hyperplane that
    many queries at once seldom have.
    """
    model.set_attn_implementation("peer_ragged")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def _ragged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    new, stored, heads = query.shape[2], key.shape[2], key.shape[1]
    seen = torch.ones(1, 1, new, stored, dtype=torch.bool).tril(stored - new)
    masked = getattr(module, "masked_key_indices", None)
    if masked is not None:
        whole = torch.ones(query.shape[0], heads, 1, stored, dtype=torch.bool)
        whole[masked[0], masked[1], 0, masked[2]] = False
        seen = (seen & whole).repeat_interleave(query.shape[1] // heads, 1)
    found = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=seen,
        scale=scaling,
        enable_gqa=True,
    )
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register("peer_ragged", _ragged_attention)
