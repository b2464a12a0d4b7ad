"""What applying a plan promises: exactness at budget 1, restoration, isolation, refusals."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cacheplan.adapters.language import describe
from cacheplan.errors import InfeasibleError, ModelMismatchError, UnsupportedError
from cacheplan.runtime import PlanCache, apply
from cacheplan.types import AccumulatedAttention, KeyNorm, KVAction, Precision, WindowAttention

IDS = torch.randint(0, 97, (1, 50), generator=torch.Generator().manual_seed(1))
HALF = KVAction(keep=0.5, scorer=WindowAttention(window=8), recent=8)


def generate(model: Any, **kwargs: Any) -> torch.Tensor:
    ids: torch.Tensor = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=12, **kwargs
    )
    return ids


def test_null_plan_is_bit_identical(tiny_llama: Any, make_plan: Any) -> None:
    plan = make_plan(KVAction(keep=1.0))
    more = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(2))
    outputs = []
    for planned in (False, True):
        cache = PlanCache(plan) if planned else None
        logits = []
        with torch.no_grad():
            if planned:
                with apply(tiny_llama, plan):
                    for part in (IDS, more[:, :1], more[:, 1:6], more[:, 6:7]):
                        logits.append(tiny_llama(input_ids=part, past_key_values=cache).logits)
            else:
                out = None
                for part in (IDS, more[:, :1], more[:, 1:6], more[:, 6:7]):
                    past = out.past_key_values if out else None
                    out = tiny_llama(input_ids=part, past_key_values=past, use_cache=True)
                    logits.append(out.logits)
        outputs.append(torch.cat(logits, 1))
    assert torch.equal(*outputs)


def test_generate_follows_the_plan_and_first_token_is_exact(
    tiny_llama: Any, make_plan: Any
) -> None:
    full = generate(tiny_llama)
    with apply(tiny_llama, make_plan(replace(HALF, keep=0.2))) as caches:
        planned = generate(tiny_llama)
    assert planned[0, 50] == full[0, 50]
    assert not torch.equal(planned, full), "evicting four fifths changes this random model"
    assert len(caches) == 1
    assert caches[0].lengths == [[10 + 11] * 2] * 3
    assert caches[0].nbytes == caches[0].planned_bytes


def test_own_cache_and_apply_agree(tiny_llama: Any, make_plan: Any) -> None:
    plan = make_plan(HALF)
    with apply(tiny_llama, plan):
        given = generate(tiny_llama)
        own = generate(tiny_llama, past_key_values=PlanCache(plan))
    assert torch.equal(given, own)


def test_leaving_restores_the_model(tiny_llama: Any, make_plan: Any) -> None:
    before = generate(tiny_llama)
    hooks = len(tiny_llama.get_decoder()._forward_pre_hooks)
    with pytest.raises(RuntimeError, match="inside"), apply(tiny_llama, make_plan(HALF)):
        raise RuntimeError("inside")
    assert tiny_llama.config._attn_implementation == "sdpa"
    assert len(tiny_llama.get_decoder()._forward_pre_hooks) == hooks
    assert torch.equal(generate(tiny_llama), before)


def test_applying_twice_is_refused(tiny_llama: Any, make_plan: Any) -> None:
    plan = make_plan(HALF)
    with apply(tiny_llama, plan):
        with pytest.raises(UnsupportedError, match="already applied"), apply(tiny_llama, plan):
            raise AssertionError("not reached")
        generate(tiny_llama)
    assert tiny_llama.config._attn_implementation == "sdpa"


def test_misaligned_steps_of_an_evicting_plan_are_refused(tiny_llama: Any, make_plan: Any) -> None:
    plan = make_plan(KVAction(keep=0.5, scorer=KeyNorm()), decode_every=4)
    cache = PlanCache(plan)
    with apply(tiny_llama, plan), torch.no_grad():
        tiny_llama(input_ids=IDS, past_key_values=cache)
        tiny_llama(input_ids=IDS[:, :3], past_key_values=cache)
        with pytest.raises(UnsupportedError, match="1 were left until then"):
            tiny_llama(input_ids=IDS[:, :2], past_key_values=cache)


def test_prompts_do_not_leak_into_each_other(tiny_llama: Any, make_plan: Any) -> None:
    plan = make_plan(HALF)
    other = torch.randint(0, 97, (1, 33))
    with apply(tiny_llama, plan):
        alone = generate(tiny_llama)
        tiny_llama.generate(other, do_sample=False, max_new_tokens=5)
        assert torch.equal(generate(tiny_llama), alone)
    cache = PlanCache(plan)
    with apply(tiny_llama, plan), torch.no_grad():
        first = tiny_llama(input_ids=IDS, past_key_values=cache).logits
        cache.reset()
        assert torch.equal(tiny_llama(input_ids=IDS, past_key_values=cache).logits, first)


@pytest.mark.parametrize("keep", [0.5, 1.0])
@pytest.mark.parametrize("heads", [1, 2])
def test_caches_are_freed_without_the_garbage_collector(
    make_plan: Any, keep: float, heads: int
) -> None:
    """A server inside one `with` block holds one cache; one kv head makes keys plain views."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=heads, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    plan = make_plan(replace(HALF, keep=keep), spec=describe(model, "tiny"))
    gc.disable()
    try:
        with apply(model, plan) as caches:
            with torch.no_grad():
                model(input_ids=IDS)  # a prompt alone: its keys may still be views of the model's
            cache = weakref.ref(caches[-1])
            rows = weakref.ref(caches[-1].layers[0].rows)
            generate(model)
            assert len(caches) == 1
            assert cache() is None
            assert rows() is None
    finally:
        gc.enable()


def test_long_decoding_takes_slack_in_blocks(tiny_llama: Any, make_plan: Any) -> None:
    plan = make_plan(
        {
            (layer, head): replace(HALF, keep=0.3 + 0.2 * head)
            for layer in range(3)
            for head in (0, 1)
        }
    )
    cache = PlanCache(plan)
    with apply(tiny_llama, plan), torch.no_grad():
        tiny_llama(input_ids=IDS, past_key_values=cache)
        for step in range(130):
            tiny_llama(input_ids=IDS[:, :1], past_key_values=cache)
            assert cache.nbytes == cache.planned_bytes, step
    assert cache.get_seq_length() == 180


def test_decode_trigger_holds_the_budget_while_generating(tiny_llama: Any, make_plan: Any) -> None:
    action = KVAction(keep=0.3, scorer=KeyNorm(), sinks=1, recent=4)
    plan = make_plan(action, decode_every=4)
    cache = PlanCache(plan)
    with apply(tiny_llama, plan), torch.no_grad():
        tiny_llama(input_ids=IDS, past_key_values=cache)
        for step in range(1, 41):
            tiny_llama(input_ids=IDS[:, :1], past_key_values=cache)
            assert cache.nbytes == cache.planned_bytes, step
            held = sum(map(sum, cache.lengths))
            assert held <= 0.3 * 6 * (50 + step) + 6 * (step % 4) + 1e-9


def test_scores_of_one_head_are_stored_for_its_layer(tiny_llama: Any, make_plan: Any) -> None:
    keeps = {(layer, head): 0.3 + 0.1 * head for layer in range(3) for head in (0, 1)}
    plan = make_plan(
        {
            at: KVAction(keep=keep, scorer=KeyNorm() if at[1] else AccumulatedAttention())
            for at, keep in keeps.items()
        },
        decode_every=2,
    )
    cache = PlanCache(plan)
    with apply(tiny_llama, plan), torch.no_grad():
        tiny_llama(input_ids=IDS, past_key_values=cache)
        for step in range(7):
            tiny_llama(input_ids=IDS[:, :1], past_key_values=cache)
            assert cache.nbytes == cache.planned_bytes, step


def test_heavy_hitters_are_column_sums_and_never_return(tiny_llama: Any, make_plan: Any) -> None:
    """H2O: after T steps the scores are the attention each kept key has received since then."""
    plan = make_plan(
        KVAction(keep=0.4, scorer=AccumulatedAttention(), recent_share=0.5), decode_every=1
    )
    cache = PlanCache(plan)
    with apply(tiny_llama, plan), torch.no_grad():
        tiny_llama(input_ids=IDS, past_key_values=cache)
        held = [layer.rows.keys[layer.rows.row(0)].clone() for layer in cache.layers]
        for token in range(12):
            tiny_llama(input_ids=torch.tensor([[token]]), past_key_values=cache)
            for before, layer in zip(held, cache.layers, strict=True):
                now = layer.rows.keys[layer.rows.row(0)]
                known = torch.cat([before, now[-1:]])
                assert all((known == key).all(-1).any() for key in now)
            held = [layer.rows.keys[layer.rows.row(0)].clone() for layer in cache.layers]
    total = sum(float(layer.rows.state[layer.rows.row(0)].sum()) for layer in cache.layers)
    assert 0 < total <= 3 * 2 * 62  # 2 query heads a group, each row hands out at most 1


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "offload": ({"losers": "offload"}, "evict"),
    "int3 keys": ({"key": Precision(format="int", bits=3)}, "2, 4 or 8"),
    "rank": ({"rank": 8}, "rank"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_run_yet_is_refused(tiny_llama: Any, make_plan: Any, name: str) -> None:
    changes, word = REFUSALS[name]
    with (
        pytest.raises(UnsupportedError, match=word),
        apply(tiny_llama, make_plan(replace(HALF, **changes))),
    ):
        raise AssertionError("not reached")


def test_window_scores_cannot_evict_while_decoding(tiny_llama: Any, make_plan: Any) -> None:
    with (
        pytest.raises(UnsupportedError, match=r"scorer\.window"),
        apply(tiny_llama, make_plan(HALF, decode_every=8)),
    ):
        raise AssertionError("not reached")


def test_other_model_is_refused(tiny_llama: Any, tiny_spec: Any, make_plan: Any) -> None:
    plan = make_plan(HALF, spec=replace(tiny_spec, digest="sha256:" + "0" * 64))
    with pytest.raises(ModelMismatchError), apply(tiny_llama, plan):
        raise AssertionError("not reached")


def test_caches_that_would_bypass_the_plan_are_refused(tiny_llama: Any, make_plan: Any) -> None:
    filled = DynamicCache(config=tiny_llama.config)
    with torch.no_grad():
        tiny_llama(input_ids=IDS, past_key_values=filled)
        with apply(tiny_llama, make_plan(HALF)):
            with pytest.raises(UnsupportedError, match="holding 50 tokens"):
                tiny_llama(input_ids=IDS[:, :1], past_key_values=filled)
            with pytest.raises(UnsupportedError, match="StaticCache"):
                generate(tiny_llama, cache_implementation="static")


def test_prompt_too_short_for_the_plan(tiny_llama: Any, make_plan: Any) -> None:
    with (
        pytest.raises(InfeasibleError, match="token"),
        apply(tiny_llama, make_plan(replace(HALF, keep=0.02))),
        torch.no_grad(),
    ):
        tiny_llama(input_ids=IDS[:, :20], use_cache=True)


def test_forward_without_cache_is_untouched(tiny_llama: Any, make_plan: Any) -> None:
    with torch.no_grad():
        before = tiny_llama(input_ids=IDS, use_cache=False).logits
        with apply(tiny_llama, make_plan(HALF)):
            assert torch.equal(tiny_llama(input_ids=IDS, use_cache=False).logits, before)
