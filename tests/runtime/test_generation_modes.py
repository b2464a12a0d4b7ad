"""The ways people generate: padded batches, later turns, beams, assistants, prompts in pieces."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cacheplan.errors import InputError, UnsupportedError
from cacheplan.recipes import CANDIDATES
from cacheplan.runtime import PlanCache, apply
from cacheplan.types import (
    AccumulatedAttention,
    KeyDifference,
    KeyNorm,
    KVAction,
    Position,
    WindowAttention,
)

LENGTHS = (23, 61, 40)
HALF = KVAction(keep=0.5, scorer=KeyDifference(), sinks=2, recent=4)
HEADS = {
    (layer, head): KVAction(
        keep=0.2 + 0.15 * layer + 0.3 * head,
        scorer=KeyDifference() if head else WindowAttention(window=16, pool=1),
        sinks=1,
        recent=3,
    )
    for layer in range(3)
    for head in range(2)
}
ACTIONS: dict[str, Any] = {
    "everything": KVAction(keep=1.0),
    "per_head": HEADS,
    **{f"{c.scorer.name}-{i}": replace(c, keep=0.4) for i, c in enumerate(CANDIDATES)},
}


def texts(lengths: tuple[int, ...] = LENGTHS, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 97, (n,), generator=generator) for n in lengths]


def padded(parts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Ids and attention mask `[B, S]`."""
    size = max(map(len, parts))
    ids = torch.zeros(len(parts), size, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, part in enumerate(parts):
        own = slice(size - len(part), None) if side == "left" else slice(0, len(part))
        ids[b, own], mask[b, own] = part, 1
    return ids, mask


def positions(mask: Tensor, new: int) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ACTIONS)
def test_padded_batch_is_its_texts_alone(
    tiny_llama: Any, make_plan: Any, name: str, side: str
) -> None:
    """Prompt, a padded second turn of several tokens, and single tokens after it."""
    plan = make_plan(ACTIONS[name])
    turns = [texts(), texts((5, 2, 7), seed=4), texts((1, 1, 1), seed=5), texts((1, 1, 1), seed=6)]
    cache, mask = PlanCache(plan), torch.zeros(3, 0, dtype=torch.long)
    together: list[list[Tensor]] = [[], [], []]
    with apply(tiny_llama, plan), torch.no_grad():
        for turn in turns:
            ids, own = padded(turn, side)
            mask = torch.cat([mask, own], dim=1)
            logits = tiny_llama(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions(mask, ids.shape[1]),
                past_key_values=cache,
            ).logits
            for b in range(3):
                together[b].append(logits[b, own[b].bool()])
        assert cache.nbytes == cache.planned_bytes
        held = 0
        for b in range(3):
            single = PlanCache(plan)
            alone = [
                tiny_llama(input_ids=turn[b][None], past_key_values=single).logits[0]
                for turn in turns
            ]
            held += single.nbytes
            torch.testing.assert_close(
                torch.cat(together[b]), torch.cat(alone), atol=1e-4, rtol=1e-4
            )
            own_rows = slice(2 * b, 2 * b + 2)
            assert [rows[own_rows] for rows in cache.lengths] == single.lengths
    assert cache.nbytes == held, "padding takes no room"


def test_generate_pads_for_itself(tiny_llama: Any, make_plan: Any) -> None:
    plan = make_plan(HEADS)
    ids, mask = padded(texts(), "left")
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    with apply(tiny_llama, plan):
        batch = tiny_llama.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
        for own, text in zip(batch, texts(), strict=True):
            one = tiny_llama.generate(
                text[None], attention_mask=torch.ones_like(text[None]), **settings
            )
            assert torch.equal(own, one[0, len(text) :])


def test_beams_of_a_full_plan_are_the_stock_beams(tiny_llama: Any, make_plan: Any) -> None:
    ids = torch.stack(texts((30, 30)))
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8}
    stock = tiny_llama.generate(ids, **settings)
    with apply(tiny_llama, make_plan(KVAction(keep=1.0))):
        assert torch.equal(tiny_llama.generate(ids, **settings), stock)
    with apply(tiny_llama, make_plan(HEADS)) as caches:
        tiny_llama.generate(ids, **settings)
        assert caches[0].nbytes == caches[0].planned_bytes


@pytest.mark.parametrize("name", ["everything", "per_head"])
def test_reordered_entries_go_on_as_themselves(tiny_llama: Any, make_plan: Any, name: str) -> None:
    plan, order = make_plan(ACTIONS[name]), [2, 0, 2]
    ids, mask = padded(texts(), "left")
    step = torch.tensor([[7], [8], [9]])
    with apply(tiny_llama, plan), torch.no_grad():

        def run(reorder: bool) -> tuple[Tensor, PlanCache]:
            cache, seen = PlanCache(plan), mask
            place = positions(seen, ids.shape[1])
            tiny_llama(
                input_ids=ids, attention_mask=seen, position_ids=place, past_key_values=cache
            )
            new = step
            if reorder:
                cache.reorder_cache(torch.tensor(order))
                seen, new = seen[order], step[order]
            for _ in range(3):
                seen = torch.cat([seen, torch.ones(3, 1, dtype=torch.long)], 1)
                logits = tiny_llama(
                    input_ids=new,
                    attention_mask=seen,
                    position_ids=positions(seen, 1),
                    past_key_values=cache,
                ).logits
            return logits, cache

        plain, _ = run(False)
        reordered, cache = run(True)
        assert cache.nbytes == cache.planned_bytes
        torch.testing.assert_close(reordered, plain[order], atol=1e-5, rtol=1e-5)


def test_repeated_and_selected_entries(tiny_llama: Any, make_plan: Any) -> None:
    cache = PlanCache(make_plan(HEADS))
    with apply(tiny_llama, make_plan(HEADS)), torch.no_grad():
        tiny_llama(input_ids=torch.stack(texts((30, 30))), past_key_values=cache)
        before = cache.lengths
        cache.batch_repeat_interleave(2)
        assert cache.lengths == [[*rows[:2], *rows[:2], *rows[2:], *rows[2:]] for rows in before]
        cache.batch_select_indices(torch.tensor([0, 3]))
        assert cache.lengths == before
        assert cache.nbytes == cache.planned_bytes


@pytest.mark.parametrize("name", ["everything", "per_head"])
def test_assisted_decoding_says_what_plain_decoding_says(
    tiny_llama: Any, make_plan: Any, name: str
) -> None:
    """The verification step brings several tokens at once, some of which are taken back."""
    text = texts((12,))[0].repeat(4)[None]
    settings = {"do_sample": False, "max_new_tokens": 20, "attention_mask": torch.ones_like(text)}
    for chunk in (None, 16):
        with apply(tiny_llama, make_plan(ACTIONS[name]), prefill_chunk=chunk) as caches:
            plain = tiny_llama.generate(text, **settings)
            lengths = [[n - 19 for n in rows] for rows in caches[0].lengths]
            assisted = tiny_llama.generate(text, prompt_lookup_num_tokens=4, **settings)
            assert torch.equal(assisted, plain)
            assert [[n - 19 for n in rows] for rows in caches[0].lengths] == lengths
            assert caches[0].nbytes == caches[0].planned_bytes


def test_what_has_been_evicted_cannot_be_taken_back(tiny_llama: Any, make_plan: Any) -> None:
    for every, tokens, words in ((None, 4, "crop no part"), (8, 2, "while decoding")):
        plan = make_plan(HALF, decode_every=every)
        cache = PlanCache(plan)
        with apply(tiny_llama, plan), torch.no_grad():
            tiny_llama(input_ids=texts()[0][None], past_key_values=cache)
            tiny_llama(input_ids=texts()[0][None, :3], past_key_values=cache)
            with pytest.raises(UnsupportedError, match=words):
                cache.crop(-tokens)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pieces_of_a_prompt_add_up_where_nothing_is_evicted(
    tiny_llama: Any, make_plan: Any, side: str
) -> None:
    ids, mask = padded(texts(), side)
    with torch.no_grad(), apply(tiny_llama, make_plan(KVAction(keep=1.0))):
        whole = tiny_llama(input_ids=ids, attention_mask=mask, use_cache=True).logits
    with torch.no_grad(), apply(tiny_llama, make_plan(KVAction(keep=1.0)), prefill_chunk=16):
        pieces = tiny_llama(input_ids=ids, attention_mask=mask, use_cache=True).logits
    assert pieces.shape == whole.shape
    torch.testing.assert_close(pieces[mask.bool()], whole[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "scorer", [Position(), KeyNorm(), WindowAttention(window=4), AccumulatedAttention()]
)
def test_prefill_in_pieces_holds_the_plan_and_one_piece(
    tiny_llama: Any, make_plan: Any, monkeypatch: pytest.MonkeyPatch, scorer: Any
) -> None:
    plan = make_plan(KVAction(keep=0.25, scorer=scorer, recent=2))
    text, most = texts((200,))[0][None], 0
    from cacheplan.runtime import layer as module

    original = module.PlanLayer._attention

    def watched(self: Any, rows: Any, step: Any) -> Tensor:
        nonlocal most
        most = max(most, max(rows.lengths))
        return original(self, rows, step)

    monkeypatch.setattr(module.PlanLayer, "_attention", watched)
    with apply(tiny_llama, plan, prefill_chunk=16) as caches:
        out = tiny_llama.generate(
            text, do_sample=False, max_new_tokens=4, attention_mask=torch.ones_like(text)
        )
    assert out.shape == (1, 204)
    assert most == 50 + 16
    assert caches[0].lengths == [[50 + 3] * 2] * 3
    assert caches[0].nbytes == caches[0].planned_bytes


def test_the_newest_tokens_are_kept_by_pieces_as_by_the_whole(
    tiny_llama: Any, make_plan: Any
) -> None:
    """A window needs no look at the whole prompt, so pieces keep the same tokens."""
    plan = make_plan(KVAction(keep=0.25, scorer=Position(), sinks=3))
    text = texts((200,))[0][None]
    keys = []
    for chunk in (None, 16):
        with apply(tiny_llama, plan, prefill_chunk=chunk) as caches, torch.no_grad():
            tiny_llama(input_ids=text)
            keys.append(caches[0].planned_layers[0].rows.keys)
    torch.testing.assert_close(keys[0], keys[1])


def test_pieces_that_cannot_be_cut_are_refused(tiny_llama: Any, make_plan: Any) -> None:
    ids = texts((40,))[0][None]
    adaptive = KVAction(keep=0.5, scorer=KeyNorm(), split="adaptive")
    with torch.no_grad():
        with (
            pytest.raises(UnsupportedError, match="whole prompt at once"),
            apply(tiny_llama, make_plan(adaptive), prefill_chunk=8),
        ):
            tiny_llama(input_ids=ids)
        with (
            pytest.raises(UnsupportedError, match="mask of its own"),
            apply(tiny_llama, make_plan(HALF), prefill_chunk=8),
        ):
            tiny_llama(input_ids=ids, attention_mask=torch.ones(1, 1, 40, 40).bool().tril())
        with (
            pytest.raises(InputError, match="at least 1"),
            apply(tiny_llama, make_plan(HALF), prefill_chunk=0),
        ):
            raise AssertionError("not reached")


def test_decoding_beyond_the_models_length_goes_on(tiny_llama: Any, make_plan: Any) -> None:
    """A window plan with decode_every holds its budget however long the text gets."""
    plan = make_plan(KVAction(keep=0.3, scorer=Position(), sinks=2), decode_every=4)
    ids = texts((40,))[0][None]
    with apply(tiny_llama, plan) as caches:
        out = tiny_llama.generate(ids, do_sample=False, max_new_tokens=60)
        assert out.shape == (1, 100)
        assert caches[0].nbytes == caches[0].planned_bytes


def test_compiled_models_follow_plans(tiny_llama: Any, make_plan: Any) -> None:
    """Attention and cache stay outside of what is compiled; the rest is compiled as ever."""
    model, plan = deepcopy(tiny_llama), make_plan(HEADS)
    ids, mask = padded(texts(), "left")
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    with apply(model, plan):
        expected = model.generate(ids, **settings)
    model.compile(backend="eager")
    with apply(model, plan) as caches:
        assert torch.equal(model.generate(ids, **settings), expected)
        assert caches[0].nbytes == caches[0].planned_bytes
    torch._dynamo.reset()
