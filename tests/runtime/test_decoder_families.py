"""The cache of every common family of decoders: what it computes, holds and refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from cacheplan.adapters.language import describe, load
from cacheplan.adapters.rotary import rotary_known
from cacheplan.errors import UnsupportedError
from cacheplan.language import solve_language
from cacheplan.profilers.collect import collect
from cacheplan.profilers.divergence import kl_divergence
from cacheplan.profilers.prompts import Prompt
from cacheplan.profilers.settings import KVSettings
from cacheplan.profilers.store import ProfileState, finish
from cacheplan.recipes import CANDIDATES, RECIPES
from cacheplan.runtime import PlanCache, apply
from cacheplan.types import (
    KeyDifference,
    KVAction,
    KVProfile,
    LanguageSpec,
    WindowAttention,
    needs_rotary,
)

FULL = """llama llama-mqa mistral qwen2 qwen3 qwen3-moe mixtral gemma phi phi3 olmo2 gpt-neox gpt2
opt stablelm starcoder2 granite smollm3 glm4""".split()
WINDOWS = "qwen2-windows gemma2 gemma3 gemma3n gemma4 olmo3 gpt-oss cohere2 llama4".split()
STATES = "qwen3-next qwen3.5 lfm2 jamba granite-hybrid".split()
FAMILIES = [*FULL, *WINDOWS, *STATES]
EAGER = {"gemma2", "gpt-oss"}  # transformers computes their attention in no other way

FORGETFUL = {"jamba"}  # transformers drops its states where a later call brings several tokens

PROMPT, MORE, CONTEXT = 61, 6, 48
Model = tuple[Any, LanguageSpec]


def ids(seed: int, length: int) -> Tensor:
    """Tokens that are all different, so that keys tell them apart even without positions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(96, generator=generator)[None, :length] + 1


@pytest.fixture(scope="module")
def recall_tokenizer() -> Any:
    return load(None).tokenizer


@pytest.fixture(scope="module")
def decoder(tiny_decoders: Any) -> Callable[[str], Model]:
    known: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in known:
            model = tiny_decoders.build(name)
            known[name] = model, describe(model, name)
        return known[name]

    return get


def per_layer(spec: LanguageSpec) -> dict[Any, KVAction]:
    scorers = KeyDifference(), WindowAttention(window=8)
    return {
        layer: KVAction(keep=0.3 + 0.2 * (i % 2), scorer=scorers[i % 2], sinks=1, recent=3)
        for i, layer in enumerate(spec.planned)
    }


def per_head(spec: LanguageSpec) -> dict[Any, KVAction]:
    return {
        (layer, head): KVAction(
            keep=0.2 + 0.5 * (head % 2),
            scorer=KeyDifference() if head else WindowAttention(window=16, pool=1),
            recent=2,
        )
        for layer in spec.planned
        for head in range(spec.kv_heads)
    }


SCORES = WindowAttention(window=16)
ACTIONS: dict[str, Callable[[LanguageSpec], Any]] = {
    "per_layer": per_layer,
    "per_head": per_head,
    "one_choice": lambda spec: KVAction(keep=0.4, scorer=SCORES, share="layer"),
    "adaptive": lambda spec: KVAction(keep=0.4, scorer=SCORES, split="adaptive", recent=2),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_equals_masked_dense(
    decoder: Any, make_plan: Any, tiny_decoders: Any, name: str, action: str
) -> None:
    """Single tokens and a second turn of several, after an eviction, and the bytes held."""
    model, spec = decoder(name)
    plan = make_plan(ACTIONS[action](spec), spec=spec)
    prompt, more = ids(1, PROMPT), ids(2, MORE)
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        stock = model(input_ids=prompt, past_key_values=full).logits
    found, masks = [], {}
    for turns in ((1,) * MORE, (MORE - 2, 1, 1))[: 1 if name in FORGETFUL else 2]:
        cache = PlanCache(plan, model)
        with apply(model, plan), torch.no_grad():
            first = model(input_ids=prompt, past_key_values=cache).logits
            masks = tiny_decoders.kept_mask(cache, full)
            assert cache.nbytes == cache.planned_bytes
            parts = torch.split(more, list(turns), dim=1)
            later = [model(input_ids=part, past_key_values=cache).logits for part in parts]
        assert cache.nbytes == cache.planned_bytes
        found.append(torch.cat(later, 1))
    if name in EAGER:
        torch.testing.assert_close(first, stock, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(first, stock), "the prompt's own logits are those of the full cache"
    assert sorted(masks) == list(spec.planned)
    assert any(not mask.all() for mask in masks.values())
    both = {"input_ids": torch.cat([prompt, more], 1)}
    dense = tiny_decoders.masked_dense_logits(model, both, context=PROMPT, masks=masks)
    for steps in found:
        torch.testing.assert_close(steps, dense[:, PROMPT:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_batch_is_its_texts_alone(decoder: Any, make_plan: Any, name: str) -> None:
    model, spec = decoder(name)
    plan = make_plan(per_head(spec), spec=spec)
    texts, more = [ids(3, 40), ids(4, 57)], [ids(5, MORE), ids(6, MORE)]
    size = max(text.shape[1] for text in texts)
    prompt, mask = torch.zeros(2, size, dtype=torch.long), torch.zeros(2, size, dtype=torch.long)
    for b, text in enumerate(texts):
        prompt[b, size - text.shape[1] :], mask[b, size - text.shape[1] :] = text[0], 1
    turns = [prompt, *torch.split(torch.cat(more), [MORE - 2, 1, 1], dim=1)]
    cache, together = PlanCache(plan, model), list[Tensor]()
    with apply(model, plan), torch.no_grad():
        for turn in turns:
            if together:
                mask = torch.cat([mask, torch.ones_like(turn)], 1)
            place = (mask.cumsum(-1) - 1).clamp(min=0)[:, -turn.shape[1] :]
            together.append(
                model(
                    input_ids=turn, attention_mask=mask, position_ids=place, past_key_values=cache
                ).logits
            )
        assert cache.nbytes == cache.planned_bytes
        held = 0
        for b, text in enumerate(texts):
            single = PlanCache(plan, model)
            for turn, batch in zip(
                [text, *[t[b : b + 1] for t in turns[1:]]], together, strict=True
            ):
                alone = model(input_ids=turn, past_key_values=single).logits
                torch.testing.assert_close(
                    batch[b : b + 1, -turn.shape[1] :], alone, atol=1e-4, rtol=1e-4
                )
            held += single.nbytes
    assert cache.nbytes == held, "padding takes no room"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_plan_changes_nothing(decoder: Any, make_plan: Any, name: str) -> None:
    model, spec = decoder(name)
    plan = make_plan(KVAction(keep=1.0), spec=spec)
    turns = [ids(1, PROMPT), *torch.split(ids(2, MORE), [1, MORE - 2, 1], dim=1)]
    outputs = []
    with torch.no_grad():
        past = DynamicCache(config=model.config)
        stock = [model(input_ids=turn, past_key_values=past).logits for turn in turns]
        with apply(model, plan):
            cache = PlanCache(plan, model)
            outputs = [model(input_ids=turn, past_key_values=cache).logits for turn in turns]
    assert cache.nbytes == cache.planned_bytes
    if name in EAGER:
        torch.testing.assert_close(outputs, stock, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(torch.cat(outputs, 1), torch.cat(stock, 1))


@torch.no_grad()
def divergence(model: Any, plan: Any, text: list[int]) -> float:
    """KL to the whole model over what follows the context, token by token under the plan."""
    tokens = torch.tensor([text])
    whole = model(input_ids=tokens, use_cache=False).logits[:, CONTEXT:-1]
    cache, found = PlanCache(plan, model), []
    with apply(model, plan):
        model(input_ids=tokens[:, :CONTEXT], past_key_values=cache)
        for at in range(CONTEXT, len(text) - 1):
            found.append(model(input_ids=tokens[:, at : at + 1], past_key_values=cache).logits)
    return float(kl_divergence(whole, torch.cat(found, 1))[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_profile_solve_generate(decoder: Any, make_plan: Any, name: str) -> None:
    model, spec = decoder(name)
    rotates = rotary_known(model)
    menu = tuple(c for c in CANDIDATES if rotates or not needs_rotary(c.scorer))
    measured = [c for c in menu if c in RECIPES["planned"].candidates]
    text = ids(7, 60)[0].tolist()
    settings = KVSettings(
        model=spec, candidates=tuple(measured), keeps=(0.1, 0.5, 1.0), probes=((0, 1),),
        ablate=1, prompts=1, prompts_digest="", seed=0, versions=(),
    )  # fmt: skip
    state = ProfileState(settings, range(1))
    prompt = Prompt(tuple(text[:CONTEXT]), tuple(text[CONTEXT:]))
    collect(model, [prompt], state, save=lambda state: None)
    profile = finish(state, "profile")
    assert isinstance(profile, KVProfile)
    damage = profile.statistics["damage"].mean
    assert (damage[..., 0] > 0).all(), "evicting nine tenths is felt in every head"
    assert (damage[..., -1] < 1e-8).all(), "keeping everything is not"
    kl = profile.statistics["ablation_kl"].mean[..., 0]
    layer, head = spec.planned[-1], spec.kv_heads - 1
    actions = {(i, h): KVAction(keep=1.0) for i in spec.planned for h in range(spec.kv_heads)}
    actions[layer, head] = replace(measured[0], keep=0.5)
    apart = divergence(model, make_plan(actions, spec=spec), text)
    assert kl[-1, head] == pytest.approx(apart, rel=1e-2, abs=1e-7), "ablating is evicting there"
    plan = solve_language(
        profile, budget=0.4, recipe="planned", solver=None, length=None, decode_every=None,
        command="",
    )  # fmt: skip
    inputs = ids(1, PROMPT)
    generation: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}
    generation |= {"attention_mask": torch.ones_like(inputs)}
    stock = model.generate(inputs, **generation)
    with apply(model, plan) as caches:
        planned = model.generate(inputs, **generation)
    assert planned.shape == stock.shape
    assert planned[0, PROMPT] == stock[0, PROMPT], "the first token is the full cache's"
    assert caches[0].nbytes == caches[0].planned_bytes
    assert sum(map(sum, caches[0].lengths)) <= 0.4 * spec.rows * PROMPT + 4 * spec.rows


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mistral-windows", "only sliding_attention layers"),
        ("falcon-h1", "hybrid layers, whose caches grow"),
        ("minimax", "transformers' own cache"),
        ("bloom", "attention interface"),
        ("deepseek-v3", "latent"),
    ],
)
def test_what_is_not_supported_is_refused(tiny_decoders: Any, name: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        describe(tiny_decoders.build(name))
    assert str(caught.value).count(". ") == 0, "one sentence"


def test_models_loaded_with_another_attention_are_refused(decoder: Any, make_plan: Any) -> None:
    model, spec = decoder("qwen3")
    model.set_attn_implementation("eager")
    try:
        with (
            pytest.raises(UnsupportedError, match="sdpa"),
            apply(model, make_plan(KVAction(keep=0.5), spec=spec)),
        ):
            raise AssertionError("not reached")
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": True}, "0 layers of GraniteForCausalLM attend"),
        ({"position_bias": torch.zeros(1, 4, 1, 1)}, "attends with position_bias"),
        ({"is_causal": False}, "both directions"),
    ],
)
def test_attention_that_a_cache_layer_cannot_do_is_refused(
    decoder: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str
) -> None:
    """A model that changes keys after the cache, or asks its attention for something else."""
    from transformers.models.granite import modeling_granite as module

    model, _ = decoder("granite")
    stock = module.ALL_ATTENTION_FUNCTIONS.get_interface

    def get_interface(*args: Any) -> Callable[..., Any]:
        inner = stock(*args)

        def attention(own: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
            if "key" in change:
                return inner(own, query, key * 1.0, value, mask, **kwargs)
            return inner(own, query, key, value, mask, **{**kwargs, **change})

        return attention

    patched = type("Patched", (), {"get_interface": staticmethod(get_interface)})()
    monkeypatch.setattr(module, "ALL_ATTENTION_FUNCTIONS", patched)
    with pytest.raises(UnsupportedError, match=words):
        describe(model)


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "gpt-oss", "lfm2", "llama4"])
def test_assisted_decoding_says_what_plain_decoding_says(
    decoder: Any, make_plan: Any, name: str
) -> None:
    """Windows and states are taken back together with the planned layers."""
    model, spec = decoder(name)
    text = ids(1, 12).repeat(1, 4)
    settings = {"do_sample": False, "max_new_tokens": 16, "attention_mask": torch.ones_like(text)}
    with apply(model, make_plan(per_head(spec), spec=spec)) as caches:
        plain = model.generate(text, **settings)
        lengths = caches[0].lengths
        assisted = model.generate(text, prompt_lookup_num_tokens=4, **settings)
        assert torch.equal(assisted, plain)
        assert caches[0].lengths == lengths
        assert caches[0].nbytes == caches[0].planned_bytes


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "qwen3-next"])
def test_beams_of_a_full_plan_are_the_stock_beams(decoder: Any, make_plan: Any, name: str) -> None:
    model, spec = decoder(name)
    prompt = ids(1, PROMPT)
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6}
    stock = model.generate(prompt, **settings)
    with apply(model, make_plan(KVAction(keep=1.0), spec=spec)) as caches:
        assert torch.equal(model.generate(prompt, **settings), stock)
        assert caches[0].nbytes == caches[0].planned_bytes


@pytest.mark.parametrize("name", ["gpt-oss", "gemma2", "gemma3", "qwen3.5"])
def test_loaded_from_a_folder(
    tiny_decoders: Any, recall_tokenizer: Any, tmp_path: Path, name: str
) -> None:
    """The attention is chosen that computes what the model says."""
    tiny_decoders.build(name).save_pretrained(tmp_path)
    recall_tokenizer.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    running = loaded.model.config._attn_implementation
    assert running == ("eager" if name in EAGER else "sdpa")
    assert loaded.processor is None
    assert loaded.spec.image_token is None
    assert loaded.spec.layer_kinds == describe(tiny_decoders.build(name)).layer_kinds
