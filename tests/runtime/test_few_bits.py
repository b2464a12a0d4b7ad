"""Caches in few bits: attention equals a dense model over the very numbers that are stored, and
bytes are those planned, scales included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cacheplan.adapters.language import describe
from cacheplan.plans.storage import divide
from cacheplan.runtime import PlanCache, apply
from cacheplan.runtime.mixed import MixedRows
from cacheplan.runtime.tiers import TieredRows
from cacheplan.types import (
    KeyDifference,
    KeyNorm,
    KVAction,
    Position,
    Precision,
    Tier,
    WindowAttention,
)

PROMPT = 150


def integer(bits: int, axis: str, group: int | None = None, **more: Any) -> Precision:
    return Precision(format="int", bits=bits, axis=axis, group=group, **more)


K4, K2 = integer(4, "channel", 32, residual=16), integer(2, "channel", 16)
V4, V2 = integer(4, "token"), integer(2, "token", 8, residual=20)
FP8 = Precision(format="float", bits=8, axis="token")
BASE = KVAction(keep=0.6, scorer=KeyDifference(), sinks=2, recent=4)
ACTIONS: dict[str, Any] = {
    "k8v8": replace(BASE, key=integer(8, "channel", 64), value=integer(8, "token")),
    "k4v4": replace(BASE, key=K4, value=V4),
    "k2v2": replace(BASE, key=K2, value=V2),
    "k4": replace(BASE, key=K4),
    "v2": replace(BASE, value=V2),
    "fp8": replace(BASE, key=FP8, value=FP8),
    "all of int4": KVAction(keep=1.0, key=K4, value=V4),
    "separable": replace(BASE, key=K4, value=integer(4, "token", separable=True)),
    "demoted": replace(
        BASE, keep=0.4, losers="demote", key=K4, value=V4, low=Tier(key=K2, value=V2)
    ),
    "demoted from 16": replace(BASE, keep=0.3, losers="demote", low=Tier(key=K2, value=V4)),
    "mixed heads": {
        (layer, head): replace(
            BASE,
            keep=0.3 + 0.2 * head + 0.1 * layer,
            scorer=KeyNorm() if head else WindowAttention(window=8),
            key=K4 if (layer + head) % 2 else Precision(),
            value=V2 if (layer + head) % 2 else Precision(),
        )
        for layer in range(3)
        for head in range(2)
    },
}


def ids(tokens: int, batch: int = 1, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 97, (batch, tokens), generator=generator)


def stored(cache: PlanCache) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Keys and values of every row as the numbers that are stored, layer by layer."""
    found = []
    for layer in cache.planned_layers:
        assert isinstance(layer.rows, MixedRows)
        keys: list[Any] = [None] * (layer.rows.batch * layer.rows.heads)
        values = list(keys)
        for heads, part in layer.rows.parts:
            k, v, offsets, lengths = part.numbers(range(part.batch))
            for i, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
                b, h = divmod(i, len(heads))
                place = slice(offset, offset + length)
                keys[b * layer.rows.heads + heads[h]] = k[place]
                values[b * layer.rows.heads + heads[h]] = v[place]
        found.append((keys, values))
    return found


def dense_step(model: Any, token: Tensor, rows: list[Any], position: int) -> Tensor:
    """Logits of one token over dense caches that hold exactly `rows`, padded with masked keys."""
    longest = max(len(k) for keys, _ in rows for k in keys)
    cache, masks = DynamicCache(config=model.config), []
    for layer, (keys, values) in zip(cache.layers, rows, strict=True):
        K, D = len(keys), keys[0].shape[1]
        key, value = torch.zeros(1, K, longest, D), torch.zeros(1, K, longest, D)
        mask = torch.zeros(K, longest, dtype=torch.bool)
        for h, (k, v) in enumerate(zip(keys, values, strict=True)):
            key[0, h, : len(k)], value[0, h, : len(v)] = k, v
            mask[h, : len(k)] = True
        layer.update(key, value)
        masks.append(mask)

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, **kw: Any) -> Any:
        G = query.shape[1] // key.shape[1]
        shown = torch.cat([masks[module.layer_idx], torch.ones(key.shape[1], 1).bool()], 1)
        logits = query @ key.repeat_interleave(G, 1).transpose(-1, -2) * kw["scaling"]
        logits = logits.masked_fill(~shown.repeat_interleave(G, 0)[None, :, None], -torch.inf)
        out = logits.softmax(-1) @ value.repeat_interleave(G, 1)
        return out.transpose(1, 2).contiguous(), None

    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("stored_dense", attention)
    AttentionMaskInterface.register("stored_dense", lambda *args, **kwargs: None)
    model.set_attn_implementation("stored_dense")
    try:
        place = torch.tensor([[position]])
        logits: Tensor = model(token, past_key_values=cache, position_ids=place).logits
        return logits
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("name", ACTIONS)
def test_attention_is_over_what_is_stored(tiny_llama: Any, make_plan: Any, name: str) -> None:
    plan = make_plan(ACTIONS[name])
    cache, full = PlanCache(plan), DynamicCache(config=tiny_llama.config)
    with torch.no_grad():
        dense = tiny_llama(ids(PROMPT), past_key_values=full).logits
        with apply(tiny_llama, plan):
            first = tiny_llama(ids(PROMPT), past_key_values=cache).logits
        assert torch.equal(first, dense), "the prompt's own logits are those of the full cache"
        assert cache.nbytes == cache.planned_bytes
        for step in range(3):
            rows, token = stored(cache), ids(1, seed=step)
            expected = dense_step(tiny_llama, token, rows, PROMPT + step)
            with apply(tiny_llama, plan):
                found = tiny_llama(token, past_key_values=cache).logits
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ACTIONS)
def test_later_turns_padding_and_bytes_while_generating(
    tiny_llama: Any, make_plan: Any, name: str
) -> None:
    """Several tokens at once equal single ones, texts of a batch equal texts alone."""
    plan = make_plan(ACTIONS[name])
    lengths, turn = (90, PROMPT), ids(6, seed=9)
    prompt = torch.zeros(2, PROMPT, dtype=torch.long)
    mask = torch.zeros_like(prompt)
    for b, n in enumerate(lengths):
        prompt[b, PROMPT - n :], mask[b, PROMPT - n :] = ids(n, seed=b)[0], 1
    cache = PlanCache(plan)
    with apply(tiny_llama, plan), torch.no_grad():
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        tiny_llama(prompt, attention_mask=mask, position_ids=place, past_key_values=cache)
        logits = []
        for part in torch.split(turn, [4, 1, 1], dim=1):
            mask = torch.cat([mask, torch.ones(2, part.shape[1], dtype=torch.long)], 1)
            place = mask.cumsum(-1)[:, -part.shape[1] :] - 1
            out = tiny_llama(
                part.expand(2, -1),
                attention_mask=mask,
                position_ids=place,
                past_key_values=cache,
            )
            logits.append(out.logits)
        assert cache.nbytes == cache.planned_bytes
        for b, n in enumerate(lengths):
            alone = PlanCache(plan)
            tiny_llama(ids(n, seed=b), past_key_values=alone)
            single = [tiny_llama(t, past_key_values=alone).logits for t in torch.split(turn, 1, 1)]
            torch.testing.assert_close(
                torch.cat(logits, 1)[b], torch.cat(single, 1)[0], atol=2e-3, rtol=2e-3
            )


def test_int8_products_of_a_cpu(make_plan: Any) -> None:
    """Keys by token and values by channel: the numbers that are stored, in bfloat16 arithmetic."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    int8: dict[str, Any] = {"key": integer(8, "token"), "value": integer(8, "channel", 256)}
    plan = make_plan(replace(BASE, keep=0.7, **int8), spec=describe(model, "wide"))
    cache = PlanCache(plan)
    with torch.no_grad():
        with apply(model, plan):
            model(ids(500), past_key_values=cache)
            assert packed_lengths(cache) == [256] * 2
            assert parts(cache, 0)[0].exact.lengths == [350 - 256] * 2
        for step in range(3):
            expected = dense_step(model, ids(1, seed=step), stored(cache), 500 + step)
            with apply(model, plan):
                found = model(ids(1, seed=step), past_key_values=cache).logits
            torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
            assert cache.path == "int8 products in 2 layers"
        with apply(model, plan):
            for step in range(260):
                assert cache.nbytes == cache.planned_bytes, step
                model(ids(1), past_key_values=cache)
            assert packed_lengths(cache) == [512] * 2
            model(ids(4), past_key_values=cache)
            cache.crop(-3)
            assert cache.tokens == [500 + 3 + 260 + 1]


@pytest.mark.parametrize("name", ["k4v4", "k2v2", "fp8", "separable", "demoted", "mixed heads"])
def test_generated_tokens_are_packed_in_time(tiny_llama: Any, make_plan: Any, name: str) -> None:
    plan = make_plan(ACTIONS[name])
    cache, token = PlanCache(plan), ids(1)
    with apply(tiny_llama, plan), torch.no_grad():
        tiny_llama(ids(PROMPT), past_key_values=cache)
        exact = [[part.exact.lengths for part in parts(cache, i)] for i in range(3)]
        for step in range(140):
            tiny_llama(token, past_key_values=cache)
            assert cache.nbytes == cache.planned_bytes, step
        later = [[part.exact.lengths for part in parts(cache, i)] for i in range(3)]
        assert later == [[[n + 12 for n in own] for own in layer] for layer in exact]


def parts(cache: PlanCache, layer: int) -> list[TieredRows]:
    rows = cache.planned_layers[layer].rows
    assert isinstance(rows, MixedRows)
    return [part for _, part in rows.parts if isinstance(part, TieredRows)]


def packed_lengths(cache: PlanCache) -> list[int]:
    high = parts(cache, 0)[0].high
    assert high is not None
    return high.lengths


def test_what_is_packed_is_never_packed_again(tiny_llama: Any, make_plan: Any) -> None:
    plan = make_plan(ACTIONS["k2v2"])
    cache = PlanCache(plan)
    with apply(tiny_llama, plan), torch.no_grad():
        tiny_llama(ids(PROMPT), past_key_values=cache)
        tier = parts(cache, 0)[0].high
        assert tier is not None
        before = [tier.row(r, torch.float32) for r in range(2)]
        for _ in range(70):
            tiny_llama(ids(1), past_key_values=cache)
        for r, (key, value) in enumerate(before):
            now = tier.row(r, torch.float32)
            assert len(now[0]) == len(key) + 64
            assert torch.equal(now[0][: len(key)], key)
            assert torch.equal(now[1][: len(value)], value)


def test_beams_and_crops_of_packed_caches(tiny_llama: Any, make_plan: Any) -> None:
    plan = make_plan(ACTIONS["mixed heads"])
    with apply(tiny_llama, plan) as caches, torch.no_grad():
        tiny_llama.generate(ids(PROMPT), num_beams=3, do_sample=False, max_new_tokens=5)
        assert caches[0].nbytes == caches[0].planned_bytes
        cache = PlanCache(plan)
        tiny_llama(ids(PROMPT), past_key_values=cache)
        for _ in range(63):
            tiny_llama(ids(1), past_key_values=cache)
        tiny_llama(ids(5, seed=8), past_key_values=cache)
        cache.crop(-4)
        held, single = cache.lengths, PlanCache(plan)
        tiny_llama(ids(PROMPT), past_key_values=single)
        for _ in range(63):
            tiny_llama(ids(1), past_key_values=single)
        tiny_llama(ids(5, seed=8)[:, :1], past_key_values=single)
        assert held == single.lengths
        token = ids(1, seed=11)
        torch.testing.assert_close(
            tiny_llama(token, past_key_values=cache).logits,
            tiny_llama(token, past_key_values=single).logits,
            atol=1e-4,
            rtol=1e-4,
        )


def test_low_tier_holds_what_does_not_stay() -> None:
    action = ACTIONS["demoted"]
    assert divide(action, 60, 90).low == 80
    assert divide(action, 60, 90).high == 32
    assert divide(action, 60, 90).exact == 150 - 80 - 32
    assert divide(replace(action, scorer=Position(), low=None, losers="evict"), 60, 90).exact == 28
