"""The gate for every way of evicting: decoding over what is left equals a dense model whose
evicted keys are masked, and the bytes are those planned."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from cacheplan.recipes import CANDIDATES
from cacheplan.runtime import PlanCache, apply
from cacheplan.types import KeyDifference, KeyNorm, KVAction, Position, WindowAttention

PROMPT, VOCABULARY = 61, 97
DROPPING = [c for c in CANDIDATES if c.losers == "evict"]  # merged keys are none of the prompt's


def prompt_ids(batch: int = 1, length: int = PROMPT, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def kept_mask(cache: PlanCache, full: DynamicCache) -> list[Tensor]:
    """Which prompt tokens each row still holds `[B, K, S]`, found by comparing keys bit by bit."""
    masks = []
    for layer, dense in zip(cache.layers, full.layers, strict=True):
        B, K, S, _ = dense.keys.shape
        mask = torch.zeros(B, K, S, dtype=torch.bool)
        for r in range(B * K):
            held = layer.rows.keys[layer.rows.row(r)]
            original = dense.keys.reshape(B * K, S, -1)[r]
            where = (held[:, None] == original[None]).all(-1)
            assert (where.sum(1) == 1).all(), "every kept key is one of the prompt's"
            mask.view(B * K, S)[r, where.int().argmax(1)] = True
        masks.append(mask)
    return masks


def masked_dense_logits(model: Any, ids: Tensor, context: int, masks: list[Tensor]) -> Tensor:
    """Logits of a full forward in which queries from `context` on cannot see evicted keys."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        T, G = query.shape[2], query.shape[1] // key.shape[1]
        visible = torch.ones(T, T, dtype=torch.bool).tril()
        shown = torch.ones(*key.shape[:2], T, dtype=torch.bool)
        shown[:, :, :context] = masks[module.layer_idx]
        late = (torch.arange(T) >= context)[:, None]
        allowed = visible & (shown[:, :, None] | ~late)
        logits = query @ key.repeat_interleave(G, 1).transpose(-1, -2) * kwargs["scaling"]
        logits = logits.masked_fill(~allowed.repeat_interleave(G, 1), float("-inf"))
        output = logits.softmax(-1) @ value.repeat_interleave(G, 1)
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("masked_dense", attention)
    AttentionMaskInterface.register("masked_dense", lambda *args, **kwargs: None)
    model.set_attn_implementation("masked_dense")
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
            return logits
    finally:
        model.set_attn_implementation("sdpa")


ACTIONS: dict[str, Any] = {
    **{f"{c.scorer.name}-{i}": replace(c, keep=0.4) for i, c in enumerate(DROPPING)},
    "per_layer": {
        0: KVAction(keep=0.7, scorer=KeyNorm(), sinks=2),
        1: KVAction(keep=0.2, scorer=WindowAttention(window=8), recent=4),
        2: KVAction(keep=0.4, scorer=Position(), sinks=4),
    },
    "per_head": {
        (layer, head): KVAction(
            keep=0.1 + 0.1 * layer + 0.3 * head,
            scorer=KeyDifference() if head else WindowAttention(window=16, pool=1),
            sinks=1,
            recent=3,
        )
        for layer in range(3)
        for head in range(2)
    },
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("chunks", [(1,) * 9, (5, 1, 1, 4, 2)], ids=["tokens", "turns"])
@pytest.mark.parametrize("name", ACTIONS)
def test_decoding_equals_masked_dense(
    tiny_llama: Any, make_plan: Any, name: str, chunks: tuple[int, ...], batch: int
) -> None:
    plan = make_plan(ACTIONS[name])
    ids = torch.cat([prompt_ids(batch), prompt_ids(batch, sum(chunks), seed=4)], dim=1)
    cache, full = PlanCache(plan), DynamicCache(config=tiny_llama.config)
    with torch.no_grad():
        dense = tiny_llama(input_ids=ids[:, :PROMPT], past_key_values=full).logits
        with apply(tiny_llama, plan):
            first = tiny_llama(input_ids=ids[:, :PROMPT], past_key_values=cache).logits
            masks = kept_mask(cache, full)
            assert cache.nbytes == cache.planned_bytes
            steps = [
                tiny_llama(input_ids=part, past_key_values=cache).logits
                for part in torch.split(ids[:, PROMPT:], list(chunks), dim=1)
            ]
    assert torch.equal(first, dense), "the prompt's own logits are those of the full cache"
    assert cache.nbytes == cache.planned_bytes
    reference = masked_dense_logits(tiny_llama, ids, PROMPT, masks)
    torch.testing.assert_close(torch.cat(steps, 1), reference[:, PROMPT:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in ACTIONS if "random" not in n])
def test_batch_entries_do_not_see_each_other(tiny_llama: Any, make_plan: Any, name: str) -> None:
    plan = make_plan(ACTIONS[name])
    pair, lengths = prompt_ids(2), []
    logits = []
    for ids in (pair, pair[:1]):
        cache = PlanCache(plan)
        with apply(tiny_llama, plan), torch.no_grad():
            tiny_llama(input_ids=ids, past_key_values=cache)
            lengths.append([layer[:2] for layer in cache.lengths])
            step = tiny_llama(input_ids=torch.tensor([[5]] * len(ids)), past_key_values=cache)
            logits.append(step.logits[0])
    assert lengths[0] == lengths[1]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("action", DROPPING, ids=lambda c: c.scorer.name)
def test_smaller_budgets_keep_subsets(tiny_llama: Any, make_plan: Any, action: KVAction) -> None:
    full = DynamicCache(config=tiny_llama.config)
    with torch.no_grad():
        tiny_llama(input_ids=prompt_ids(), past_key_values=full)
    masks = []
    for keep in (0.1, 0.25, 0.5, 0.9):
        plan = make_plan(replace(action, keep=keep))
        with apply(tiny_llama, plan), torch.no_grad():
            cache = PlanCache(plan)
            tiny_llama(input_ids=prompt_ids(), past_key_values=cache)
        masks.append(kept_mask(cache, full))
    for smaller, larger in pairwise(masks):
        for few, many in zip(smaller, larger, strict=True):
            assert not (few & ~many).any()
