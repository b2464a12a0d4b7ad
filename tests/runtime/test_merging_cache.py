"""Caches that merge: decoding equals a dense model that attends to explicitly merged tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from cacheplan.runtime import PlanCache, apply
from cacheplan.scorers.merging import Row, fold
from cacheplan.scorers.scores import Seen, score
from cacheplan.scorers.selection import kept_tokens
from cacheplan.types import AccumulatedAttention, KeyNorm, KVAction, Merge, WindowAttention

PROMPT, VOCABULARY = 60, 97
SUMS = KVAction(keep=0.4, scorer=AccumulatedAttention(), sinks=1, recent=3, losers="merge")
ACTIONS = {
    "nearest": replace(SUMS, merge=Merge()),
    "uncounted": replace(SUMS, share="layer", merge=Merge(count_bias=False)),
    "similar": replace(SUMS, merge=Merge(to="similar", similarity=0.2)),
    "adaptive": replace(SUMS, merge=Merge(to="similar", similarity=0.2), split="adaptive"),
}


def ids_of(batch: int, length: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def merged_dense_logits(model: Any, ids: Tensor, action: KVAction) -> Tensor:
    """Logits of a full forward whose queries behind the prompt see merged tokens instead of it."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        C, T, scale = PROMPT, query.shape[2], kwargs["scaling"]
        H, K = query.shape[1], key.shape[1]
        G, out = H // K, torch.zeros(1, H, T, value.shape[-1])
        seen = Seen(query[:, :, :C], key[:, :, :C], value[:, :, :C], scale)
        scores = score(action.scorer, seen)
        kept = kept_tokens(scores, [int(action.keep * C)] * K, action)
        if action.share == "layer":
            scores = scores.mean(1, keepdim=True).expand_as(scores)
        for h in range(K):
            row = fold(
                Row(key[0, h, :C], value[0, h, :C], torch.ones(C)), scores[0, h], kept[h], action
            )
            own = slice(h * G, (h + 1) * G)
            early = query[0, own, :C] @ key[0, h, :C].T * scale
            early = early.masked_fill(torch.ones(C, C).triu(1).bool(), float("-inf"))
            out[0, own, :C] = early.softmax(-1) @ value[0, h, :C]
            keys = torch.cat([row.key, key[0, h, C:]])
            values = torch.cat([row.value, value[0, h, C:]])
            logits = query[0, own, C:] @ keys.T * scale
            logits[..., : len(row.key)] += row.count.log()
            logits = logits.masked_fill(
                torch.ones(T - C, len(keys)).triu(len(row.key) + 1).bool(), float("-inf")
            )
            out[0, own, C:] = logits.softmax(-1) @ values
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("merged_dense", attention)
    AttentionMaskInterface.register("merged_dense", lambda *args, **kwargs: None)
    model.set_attn_implementation("merged_dense")
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
            return logits
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("chunks", [(1,) * 9, (5, 1, 1, 4, 2)], ids=["tokens", "turns"])
@pytest.mark.parametrize("name", ACTIONS)
def test_decoding_equals_dense_attention_to_merged_tokens(
    tiny_llama: Any, make_plan: Any, name: str, chunks: tuple[int, ...]
) -> None:
    plan = make_plan(ACTIONS[name])
    ids = torch.cat([ids_of(1, PROMPT), ids_of(1, sum(chunks), seed=4)], dim=1)
    cache = PlanCache(plan)
    with torch.no_grad():
        dense = tiny_llama(input_ids=ids[:, :PROMPT], use_cache=False).logits
        with apply(tiny_llama, plan):
            first = tiny_llama(input_ids=ids[:, :PROMPT], past_key_values=cache).logits
            assert cache.nbytes == cache.planned_bytes
            steps = [
                tiny_llama(input_ids=part, past_key_values=cache).logits
                for part in torch.split(ids[:, PROMPT:], list(chunks), dim=1)
            ]
    assert torch.equal(first, dense), "the prompt's own logits are those of the full cache"
    assert cache.nbytes == cache.planned_bytes
    reference = merged_dense_logits(tiny_llama, ids, ACTIONS[name])
    torch.testing.assert_close(torch.cat(steps, 1), reference[:, PROMPT:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("merge", [Merge(), Merge(to="similar")])
def test_keeping_everything_is_the_full_cache(
    tiny_llama: Any, make_plan: Any, merge: Merge
) -> None:
    ids = ids_of(1, PROMPT)
    with torch.no_grad():
        full = tiny_llama.generate(ids, do_sample=False, max_new_tokens=6)
        with apply(tiny_llama, make_plan(replace(SUMS, keep=1.0, merge=merge))) as caches:
            assert torch.equal(tiny_llama.generate(ids, do_sample=False, max_new_tokens=6), full)
            assert caches[0].nbytes == caches[0].planned_bytes, "the bias is counted all the same"


def test_counts_go_on_growing_in_pieces_and_while_decoding(tiny_llama: Any, make_plan: Any) -> None:
    """Where every loser finds an anchor, the counts add up to all tokens seen."""
    ids = ids_of(2, 80)
    for scorer in (KeyNorm(), WindowAttention(window=1, pool=1), AccumulatedAttention()):
        action = KVAction(keep=0.25, scorer=scorer, losers="merge", merge=Merge())
        with apply(tiny_llama, make_plan(action, decode_every=4), prefill_chunk=16) as caches:
            tiny_llama.generate(ids, do_sample=False, max_new_tokens=9)
        cache = caches[0]
        assert cache.nbytes == cache.planned_bytes
        for layer in cache.planned_layers:
            for r in range(layer.rows.batch * layer.rows.heads):
                assert layer.rows.merged(r).count.sum() == 80 + 8


def test_merged_tokens_weigh_as_many_where_they_are_scored(tiny_llama: Any, make_plan: Any) -> None:
    """Scores that follow attention see the bias, so they sum to the number of queries."""
    action = KVAction(keep=0.25, scorer=AccumulatedAttention(), losers="merge", merge=Merge())
    plan = make_plan(action, decode_every=8)
    with apply(tiny_llama, plan) as caches, torch.no_grad():
        tiny_llama.generate(ids_of(1, 40), do_sample=False, max_new_tokens=2)
        layer = caches[0].planned_layers[0]
        before = layer.rows.state.clone()
        key = layer.rows.keys[layer.rows.row(0)]
        query = torch.randn(1, 4, 1, 16)
        from cacheplan.runtime.eviction import accumulate

        accumulate(layer.rows, 0, query, 0.25)
        bias = layer.rows.bias[layer.rows.row(0)]
        expected = (query[0, :2, 0] @ key.T * 0.25 + bias).softmax(-1).sum(0)
        gained = (layer.rows.state - before)[layer.rows.row(0)]
        torch.testing.assert_close(gained, expected, atol=1e-5, rtol=1e-5)


def test_beams_and_selections_carry_their_counts(tiny_llama: Any, make_plan: Any) -> None:
    cache = PlanCache(plan := make_plan(ACTIONS["nearest"]))
    with apply(tiny_llama, plan), torch.no_grad():
        tiny_llama(input_ids=ids_of(2, 40), past_key_values=cache)
        layer: Any = cache.planned_layers[0]
        before = layer.rows.merged(2).count
        cache.reorder_cache(torch.tensor([1, 0, 1]))
        assert torch.equal(layer.rows.merged(0).count, before)
        tiny_llama(input_ids=ids_of(3, 1), past_key_values=cache)
        assert torch.equal(layer.rows.merged(4).count, torch.cat([before, torch.ones(1)]))
        assert cache.nbytes == cache.planned_bytes
