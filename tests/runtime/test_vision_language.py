"""Vision-language models under a plan: images in the prompt, in a later turn, and in batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from cacheplan.adapters.attention import attending
from cacheplan.adapters.images import Images
from cacheplan.adapters.language import describe
from cacheplan.errors import UnsupportedError
from cacheplan.profilers.collect import measure
from cacheplan.profilers.observer import Menu
from cacheplan.profilers.prompts import Prompt
from cacheplan.runtime import PlanCache, apply
from cacheplan.types import KeyDifference, KeyNorm, KVAction, LanguageSpec, WindowAttention
from cacheplan.verification import measure_damage

NAMES = ["llava", "gemma3", "qwen2.5-vl"]
SCORES = WindowAttention(window=8, pool=3)
Model = tuple[Any, LanguageSpec]


@pytest.fixture(scope="module")
def vision(tiny_vision: Any) -> Callable[[str], Model]:
    known: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in known:
            model = tiny_vision.build(name)
            known[name] = model, describe(model, name)
        return known[name]

    return get


def per_head(spec: LanguageSpec) -> dict[Any, KVAction]:
    scorers = KeyDifference(), SCORES
    return {
        (layer, head): KVAction(keep=0.2 + 0.4 * head, scorer=scorers[head], recent=2)
        for layer in spec.planned
        for head in range(spec.kv_heads)
    }


ACTIONS: dict[str, Callable[[LanguageSpec], Any]] = {
    "per_head": per_head,
    "one_choice": lambda spec: KVAction(keep=0.4, scorer=SCORES, share="layer"),
    "adaptive": lambda spec: KVAction(keep=0.4, scorer=SCORES, split="adaptive", recent=2),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_with_images_equals_masked_dense(
    vision: Any, make_plan: Any, tiny_vision: Any, tiny_decoders: Any, name: str, action: str
) -> None:
    """A prompt with two images, a turn with a third, single words, and a turn of words."""
    model, spec = vision(name)
    plan = make_plan(ACTIONS[action](spec), spec=spec)
    shapes = [(1, 40, 2), (2, 9, 1), (3, 1, 0), (4, 1, 0), (5, 4, 0)]
    turns = [tiny_vision.turn(*shape) for shape in shapes]
    said = [tiny_vision.inputs(name, model, turns[: i + 1], 1) for i in range(len(turns))]
    full, cache = DynamicCache(config=model.config), PlanCache(plan, model)
    with torch.no_grad():
        stock = model(**said[0], past_key_values=full).logits
        with apply(model, plan):
            first = model(**said[0], past_key_values=cache).logits
            assert torch.equal(first, stock), "the prompt's own logits are those of the full cache"
            masks = tiny_decoders.kept_mask(cache, full)
            assert cache.nbytes == cache.planned_bytes
            later = [model(**one, past_key_values=cache).logits for one in said[1:]]
    assert cache.nbytes == cache.planned_bytes
    ids = torch.cat([turn.ids for turn in turns], 1)
    context = turns[0].ids.shape[1]
    dense = tiny_decoders.masked_dense_logits(
        model,
        tiny_vision.inputs(name, model, turns),
        context=context,
        masks=masks,
        images=tiny_vision.images(ids) if name == "gemma3" else None,
    )
    torch.testing.assert_close(torch.cat(later, 1), dense[:, context:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_plan_changes_nothing(
    vision: Any, make_plan: Any, tiny_vision: Any, name: str
) -> None:
    model, spec = vision(name)
    plan = make_plan(KVAction(keep=1.0), spec=spec)
    turns = [tiny_vision.turn(*shape) for shape in [(1, 40, 2), (2, 9, 1), (3, 1, 0), (5, 4, 0)]]
    said = [tiny_vision.inputs(name, model, turns[: i + 1], 1) for i in range(len(turns))]
    with torch.no_grad():
        full = DynamicCache(config=model.config)
        stock = [model(**one, past_key_values=full).logits for one in said]
        with apply(model, plan):
            cache = PlanCache(plan, model)
            planned = [model(**one, past_key_values=cache).logits for one in said]
    assert torch.equal(torch.cat(planned, 1), torch.cat(stock, 1))
    assert cache.nbytes == cache.planned_bytes
    assert model.config.vision_config._attn_implementation == "sdpa"


def batch_of_two(name: str, tiny_vision: Any) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """What `generate` gets for a padded batch, and for each of its texts alone."""
    turns, alone = [tiny_vision.turn(1, 20, 1), tiny_vision.turn(2, 40, 2)], []
    size = max(turn.ids.shape[1] for turn in turns)
    ids, mask = torch.zeros(2, size, dtype=torch.long), torch.zeros(2, size, dtype=torch.long)
    kinds = "token_type_ids" if name == "gemma3" else "mm_token_type_ids"
    for b, turn in enumerate(turns):
        ids[b, size - turn.ids.shape[1] :], mask[b, size - turn.ids.shape[1] :] = turn.ids[0], 1
        one = {"input_ids": turn.ids, "attention_mask": torch.ones_like(turn.ids)}
        one["pixel_values"] = tiny_vision.pixels(name, turn)
        if name != "llava":
            one[kinds] = (turn.ids == tiny_vision.IMAGE).long()
        if name == "qwen2.5-vl":
            one["image_grid_thw"] = torch.tensor([[1, 6, 6]] * turn.images)
        alone.append(one)
    both = {"input_ids": ids, "attention_mask": mask}
    for word in alone[0].keys() - both.keys():
        both[word] = torch.cat([one[word] for one in alone]) if word != kinds else ids
    if kinds in both:
        both[kinds] = (ids == tiny_vision.IMAGE).long()
    return both, alone


@pytest.mark.parametrize("name", NAMES)
def test_generate_reads_images_and_pads(
    vision: Any, make_plan: Any, tiny_vision: Any, name: str
) -> None:
    model, spec = vision(name)
    both, alone = batch_of_two(name, tiny_vision)
    settings = {"do_sample": False, "max_new_tokens": 6}
    length = both["input_ids"].shape[1]
    with apply(model, make_plan(KVAction(keep=1.0), spec=spec)):
        planned = [model.generate(**one, **settings) for one in alone]
    for one, same in zip(alone, planned, strict=True):
        assert torch.equal(model.generate(**one, **settings), same)
    with apply(model, make_plan(per_head(spec), spec=spec)) as caches:
        together = model.generate(**both, **settings)
        assert caches[0].nbytes == caches[0].planned_bytes
        assert caches[0].tokens == [one["input_ids"].shape[1] + 5 for one in alone]
        for b, one in enumerate(alone):
            single = model.generate(**one, **settings)
            assert torch.equal(together[b, length:], single[0, one["input_ids"].shape[1] :])


def prompt_of(name: str, tiny_vision: Any, seed: int, pictures: int) -> Prompt:
    turn = tiny_vision.turn(seed, 50 - 10 * pictures, pictures)
    ids = turn.ids[0].tolist()
    whole, kinds = {}, {}
    if pictures:
        whole["pixel_values"] = tiny_vision.pixels(name, turn)
        word = {"gemma3": "token_type_ids", "qwen2.5-vl": "mm_token_type_ids"}.get(name)
        if word:
            kinds[word] = (turn.ids[:, :-8] == tiny_vision.IMAGE).long()
        if name == "qwen2.5-vl":
            whole["image_grid_thw"] = torch.tensor([[1, 6, 6]] * pictures)
    images = Images(whole, kinds) if pictures else None
    return Prompt(tuple(ids[:-8]), tuple(ids[-8:]), images=images)


@pytest.mark.parametrize("name", NAMES)
def test_ablating_is_evicting(vision: Any, make_plan: Any, tiny_vision: Any, name: str) -> None:
    """Texts with images and without, one after the other: positions must not be mixed up."""
    model, spec = vision(name)
    action = KVAction(keep=1.0, scorer=SCORES, recent=2)
    menu, layer = Menu((action,), (0.25, 1.0)), spec.planned[-1]
    whole = {(i, h): KVAction(keep=1.0) for i in spec.planned for h in range(spec.kv_heads)}
    plan = make_plan({**whole, (layer, 1): replace(action, keep=0.25)}, spec=spec)
    for seed, pictures in ((1, 2), (2, 0), (3, 1), (4, 0)):
        prompt = prompt_of(name, tiny_vision, seed, pictures)
        with attending(model), torch.no_grad():
            found = measure(model, prompt, menu, ((0, 0),))
        applied = measure_damage(model, plan, [prompt]).damage.kl
        assert applied > 1e-6
        assert found["ablation_kl"][-1, 1, 0] == pytest.approx(applied, rel=1e-2)
        assert ("image_mass" in found) == (pictures > 0)


@pytest.mark.parametrize("split", ["equal", "adaptive"])
@pytest.mark.parametrize("name", NAMES)
def test_text_stays_before_images(
    vision: Any, make_plan: Any, tiny_vision: Any, tiny_decoders: Any, name: str, split: str
) -> None:
    """With room for all text, images share the rest; without, no image token stays."""
    model, spec = vision(name)
    turn = tiny_vision.turn(1, 40, 2)
    said = tiny_vision.inputs(name, model, [turn])
    images = turn.ids[0] == tiny_vision.IMAGE
    text = int((~images).sum())
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**said, past_key_values=full)
    for keep in (0.3, 0.85):
        scorer = WindowAttention(window=8, pool=1)
        action = KVAction(keep=keep, scorer=scorer, split=split, protect_text=True, recent=2)
        plan, free = (
            make_plan(replace(action, protect_text=protect), spec=spec) for protect in (True, False)
        )
        masks = []
        for one in (plan, free):
            with apply(model, one) as caches, torch.no_grad():
                model(**said)
            masks.append(tiny_decoders.kept_mask(caches[0], full))
            assert caches[0].nbytes == caches[0].planned_bytes
        for layer, protected in masks[0].items():
            shown = protected[0, :, images].sum()
            if keep < 0.5:
                assert shown == 0
            else:
                assert protected[0, :, ~images].all()
                assert shown == protected.sum() - spec.kv_heads * text > 0
            assert masks[1][layer][0, :, images].any(), "without the prior some image tokens stay"


def test_text_before_images_in_padded_batches(
    vision: Any, make_plan: Any, tiny_vision: Any
) -> None:
    model, spec = vision("llava")
    both, alone = batch_of_two("llava", tiny_vision)
    settings = {"do_sample": False, "max_new_tokens": 3}
    plan = make_plan(KVAction(keep=0.4, scorer=SCORES, protect_text=True), spec=spec)
    keys = []
    with apply(model, plan) as caches:
        model.generate(**both, **settings)
        rows = [layer.rows for layer in caches[0].planned_layers]
        for b, one in enumerate(alone):
            model.generate(**one, **settings)
            for layer, single in enumerate(caches[0].planned_layers):
                for h in range(spec.kv_heads):
                    own = rows[layer].keys[rows[layer].row(b * spec.kv_heads + h)]
                    keys.append((own, single.rows.keys[single.rows.row(h)]))
    for own, other in keys:
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


def test_text_before_images_needs_to_know_the_images(
    vision: Any, make_plan: Any, tiny_vision: Any
) -> None:
    model, spec = vision("llava")
    action = KVAction(keep=0.4, scorer=SCORES, protect_text=True)
    ids = tiny_vision.turn(1, 40, 0).ids
    with apply(model, make_plan(action, spec=spec)), torch.no_grad():
        with pytest.raises(UnsupportedError, match="which tokens are images"):
            model(inputs_embeds=model.get_input_embeddings()(ids))
        model(input_ids=ids)
    with (
        pytest.raises(UnsupportedError, match="whole prompt at once"),
        apply(model, make_plan(action, spec=spec), prefill_chunk=8),
        torch.no_grad(),
    ):
        model(input_ids=ids)
    with (
        pytest.raises(UnsupportedError, match="protect_text"),
        apply(model, make_plan(replace(action, scorer=KeyNorm()), spec=spec, decode_every=4)),
    ):
        raise AssertionError("not reached")
