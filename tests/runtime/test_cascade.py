"""Tokens divided among layers while the prompt is read: the same as at once, in bounded memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cacheplan.adapters.attention import attending
from cacheplan.errors import PlanError, UnsupportedError
from cacheplan.plans.check import check, check_runnable
from cacheplan.plans.rows import kept_rows
from cacheplan.profilers.collect import measure
from cacheplan.profilers.observer import Menu
from cacheplan.profilers.prompts import Prompt
from cacheplan.runtime import PlanCache, apply
from cacheplan.runtime.cascade import divide
from cacheplan.runtime.layer import PlanLayer
from cacheplan.runtime.rows import RaggedRows
from cacheplan.types import (
    AccumulatedAttention,
    KeyNorm,
    KVAction,
    Merge,
    Preference,
    ProbeAttention,
    Trigger,
    WindowAttention,
)

S = 70
CAKE = KVAction(
    keep=0.3, scorer=WindowAttention(window=8, variance=200.0, pool=3), sinks=1, recent=4
)
ONLINE = Trigger(online=Preference(tau_dispersion=1.5, tau_shift=0.4))

weights_lists = st.lists(st.floats(0, 100) | st.just(1.0), min_size=1, max_size=8)


@given(weights=weights_lists, total=st.integers(0, 200), most=st.integers(0, 40))
def test_parts_are_proportional_and_never_grow(weights: list[float], total: int, most: int) -> None:
    before: list[int] = []
    for m in range(1, len(weights) + 1):
        parts = divide(weights[:m], total, most)
        assert sum(parts) == min(total, most * m)
        assert max(parts) <= most
        assert all(now <= then for now, then in zip(parts, before, strict=False))
        before = parts
    for a, b in zip(weights, parts, strict=True):
        for c, d in zip(weights, parts, strict=True):
            if a > max(c, 1e-30):  # below that all count alike
                assert b >= d


def test_the_published_example() -> None:
    assert divide([4, 2, 1, 1], 64, 1000) == [32, 16, 8, 8]
    assert divide([4, 2, 1, 1], 64, 20) == [20, 20, 12, 12]
    assert divide([0, 0], 5, 4) == [3, 2]


def text(batch: int = 1, length: int = S, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 97, (batch, length), generator=generator)


def held_by(layer: PlanLayer) -> RaggedRows:
    assert isinstance(layer.rows, RaggedRows)
    return layer.rows


@pytest.mark.parametrize("scorer", [CAKE.scorer, AccumulatedAttention(), KeyNorm()])
def test_cascading_is_a_division_at_once(tiny_llama: Any, make_plan: Any, scorer: Any) -> None:
    """Each layer holds what a plan made with the same parts keeps, and all what the plan promises.

    Before every layer's attention no more is held than the plan's tokens and one layer.
    """
    action = replace(CAKE, scorer=scorer)
    plan = replace(make_plan(action), trigger=ONLINE)
    total, most = int(kept_rows(plan, S).sum()), 0
    cache, original = PlanCache(plan), PlanLayer._attention

    def watched(self: Any, rows: Any, step: Any) -> Tensor:
        nonlocal most
        held = [layer.rows.lengths for layer in cache.planned_layers if layer.rows is not None]
        most = max(most, sum(map(sum, held)))
        return original(self, rows, step)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), apply(tiny_llama, plan):
        patch.setattr(PlanLayer, "_attention", watched)
        first = tiny_llama(input_ids=text(), past_key_values=cache).logits
        keys = [rows.keys.clone() for rows in map(held_by, cache.planned_layers)]
        assert cache.nbytes == cache.planned_bytes
        assert most <= total + 2 * S
        tiny_llama.generate(text(), past_key_values=PlanCache(plan), max_new_tokens=3)
    assert torch.equal(first, tiny_llama(input_ids=text()).logits)
    counts = [lengths[0] for lengths in cache.lengths]
    assert len(set(counts)) > 1, "layers prefer different parts"
    assert 2 * sum(counts) == total

    menu = Menu((KVAction(keep=1.0),), (1.0,))
    prompt = Prompt(tuple(text()[0].tolist()), (1, 2, 3), ())
    with attending(tiny_llama), torch.no_grad():
        found = measure(tiny_llama, prompt, menu, ())
    weight = found["window_dispersion"] ** (1 / 1.5) * found["window_shift"] ** (1 / 0.4)
    spare = divide(weight.tolist(), total // 2 - 3 * 5, S - 5)
    assert counts == [5 + part for part in spare]

    at_once = make_plan(
        {layer: replace(action, keep=count / S) for layer, count in enumerate(counts)}
    )
    with apply(tiny_llama, at_once) as caches, torch.no_grad():
        tiny_llama(input_ids=text())
    for a, layer in zip(keys, caches[0].planned_layers, strict=True):
        assert torch.equal(a, layer.rows.keys)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_of_a_batch_have_parts_of_their_own(
    tiny_llama: Any, make_plan: Any, side: str
) -> None:
    plan = replace(make_plan(CAKE), trigger=ONLINE)
    whole, short = text(seed=4), text(length=50, seed=5)
    pad = torch.zeros(1, S - 50, dtype=torch.long)
    ids = torch.cat([whole, torch.cat([pad, short] if side == "left" else [short, pad], 1)])
    mask = (ids != 0).long()
    together = PlanCache(plan)
    with apply(tiny_llama, plan), torch.no_grad():
        tiny_llama(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=together,
        )
        assert together.nbytes == together.planned_bytes
        for b, own in enumerate((whole, short)):
            alone = PlanCache(plan)
            tiny_llama(input_ids=own, past_key_values=alone)
            assert [rows[2 * b : 2 * b + 2] for rows in together.lengths] == alone.lengths


def test_a_cascade_starts_anew_with_every_prompt(tiny_llama: Any, make_plan: Any) -> None:
    plan = replace(make_plan(CAKE), trigger=ONLINE)
    cache, lengths = PlanCache(plan), []
    with apply(tiny_llama, plan), torch.no_grad():
        for ids in (text(seed=8), text(seed=9), text(seed=8)):
            cache.reset()
            tiny_llama(input_ids=ids, past_key_values=cache)
            lengths.append(cache.lengths)
    assert lengths[0] == lengths[2]


@pytest.mark.parametrize(
    ("changes", "trigger", "words"),
    [
        ({"split": "adaptive"}, {}, "split"),
        ({"losers": "merge", "merge": Merge()}, {}, "losers"),
        ({"recent_share": 0.5}, {}, "recent_share"),
        ({"scorer": ProbeAttention()}, {}, "without probes"),
        ({"scorer": KeyNorm()}, {"decode_every": 4}, "trigger.decode_every"),
        ({}, {"prefill_chunk": 4}, "trigger.prefill_chunk"),
    ],
)
def test_what_cannot_cascade_is_refused(
    make_plan: Any, changes: dict[str, Any], trigger: dict[str, Any], words: str
) -> None:
    plan = make_plan(replace(CAKE, **changes))
    check(plan)
    with pytest.raises(UnsupportedError, match=words):
        check_runnable(replace(plan, trigger=replace(ONLINE, **trigger)))


def test_heads_of_their_own_and_odd_exponents_are_refused(make_plan: Any) -> None:
    heads = make_plan({(layer, h): CAKE for layer in range(3) for h in range(2)})
    with pytest.raises(UnsupportedError, match=r"entries\[1\].site.head|entries\[0\].site.head"):
        check_runnable(replace(heads, trigger=ONLINE))
    for trigger in (Trigger(online=Preference(tau_shift=0.0)), Trigger(prefill_chunk=0)):
        with pytest.raises(PlanError, match="trigger"):
            check(replace(make_plan(CAKE), trigger=trigger))


def test_plans_read_prompts_in_their_own_pieces(tiny_llama: Any, make_plan: Any) -> None:
    """As `prefill_chunk` does where it is given, which goes before the plan's."""
    plan = make_plan(CAKE)
    lengths: dict[int | None, list[Any]] = {}
    for own, asked in ((None, 16), (16, None), (16, 32), (None, 32)):
        chunked = replace(plan, trigger=Trigger(prefill_chunk=own))
        with apply(tiny_llama, chunked, prefill_chunk=asked) as caches, torch.no_grad():
            tiny_llama(input_ids=text())
        keys = [layer.rows.keys for layer in caches[0].planned_layers]
        lengths.setdefault(asked or own, []).append(torch.cat(keys))
    for first, second in lengths.values():
        assert torch.equal(first, second)
    assert not torch.equal(lengths[16][0], lengths[32][0])
