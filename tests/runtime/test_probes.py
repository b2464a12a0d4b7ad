"""Tokens read behind a prompt to score it: what they find, and that they leave no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from cacheplan.adapters.attention import attending
from cacheplan.adapters.language import describe
from cacheplan.adapters.probe_tokens import probe_fits
from cacheplan.errors import UnsupportedError
from cacheplan.profilers.observer import Menu
from cacheplan.profilers.probe_reader import read_probes
from cacheplan.runtime import PlanCache, apply
from cacheplan.runtime.layer import PlanLayer
from cacheplan.types import KeyNorm, KVAction, ProbeAttention, Scorer

S = 45
FILLER = ProbeAttention(tokens=8)
AGAIN = ProbeAttention(content="prompt", tokens=16, ids=(5, 6), reduce="max")


def text(length: int = S, seed: int = 3, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 97, (batch, length), generator=generator)


def weights_behind(model: Any, ids: Tensor, start: int, positions: Tensor) -> list[Tensor]:
    """Attention of the tokens from `start` on to those before, of a plain forward, per layer."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = model(
                input_ids=ids, position_ids=positions, output_attentions=True, use_cache=False
            ).attentions
    finally:
        model.set_attn_implementation("sdpa")
    return [weights[0, :, start:, :start] for weights in found]


def probed_by(model: Any, ids: Tensor, scorer: ProbeAttention) -> list[Tensor]:
    """What the profiler finds with a probe, `[K, S]` per layer."""
    menu = Menu((KVAction(keep=1.0, scorer=scorer),), (1.0,))
    with attending(model), torch.no_grad():
        found = read_probes(model, ids, list(range(3)), menu)
    return [found[layer][scorer][0] for layer in range(3)]


def test_filler_that_is_the_true_continuation_is_the_oracle_window(tiny_llama: Any) -> None:
    ids = text(S + 8)
    scorer = replace(FILLER, ids=tuple(ids[0, S:].tolist()))
    expected = weights_behind(tiny_llama, ids, S, torch.arange(S + 8)[None])
    for found, weights in zip(probed_by(tiny_llama, ids[:, :S], scorer), expected, strict=True):
        summed = weights.sum(1).view(2, 2, S).mean(1)
        torch.testing.assert_close(found, summed, atol=1e-5, rtol=1e-4)


def test_a_prompt_read_again_is_a_longer_text(tiny_llama: Any) -> None:
    """Each piece stands right behind the prompt, not behind the piece before it."""
    ids = text()
    best = [torch.zeros(2, S)] * 3
    for start in range(0, S, 16):
        piece = torch.cat([torch.tensor([[5, 6]]), ids[:, start : start + 16]], dim=1)
        whole = torch.cat([ids, piece], dim=1)
        positions = torch.arange(whole.shape[1])[None]
        for layer, weights in enumerate(weights_behind(tiny_llama, whole, S, positions)):
            best[layer] = torch.maximum(best[layer], weights.amax(1).view(2, 2, S).amax(1))
    for found, expected in zip(probed_by(tiny_llama, ids, AGAIN), best, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scorer", [FILLER, AGAIN], ids=lambda s: s.content)
def test_runtime_and_profiler_find_the_same(
    tiny_llama: Any, make_plan: Any, scorer: ProbeAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    original = PlanLayer.evict_probed

    def watched(layer: PlanLayer) -> None:
        seen.extend(probed[scorer][0] for probed in layer._probed)
        original(layer)

    monkeypatch.setattr(PlanLayer, "evict_probed", watched)
    ids = text()
    with apply(tiny_llama, make_plan(KVAction(keep=0.3, scorer=scorer))), torch.no_grad():
        tiny_llama(input_ids=ids)
    for a, b in zip(seen, probed_by(tiny_llama, ids, scorer), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scorer", [FILLER, AGAIN], ids=lambda s: s.content)
def test_probes_leave_no_trace(tiny_llama: Any, make_plan: Any, scorer: ProbeAttention) -> None:
    """With everything kept, all logits are those of the stock cache, bit for bit."""
    ids, plan = text(batch=2), make_plan(KVAction(keep=1.0, scorer=scorer))
    stock, cache, logits = DynamicCache(config=tiny_llama.config), PlanCache(plan), []
    with torch.no_grad():
        for past in (stock, cache):
            for part in (ids, ids[:, :1], ids[:, :5]):
                if past is stock:
                    logits.append(tiny_llama(input_ids=part, past_key_values=past).logits)
                else:
                    with apply(tiny_llama, plan):
                        logits.append(tiny_llama(input_ids=part, past_key_values=past).logits)
    for a, b in zip(logits[:3], logits[3:], strict=True):
        assert torch.equal(a, b)
    assert cache.get_seq_length() == S + 6
    assert cache.lengths == [[S + 6] * 4] * 3
    assert cache.nbytes == cache.planned_bytes


def test_heads_with_and_without_probes_share_a_layer(tiny_llama: Any, make_plan: Any) -> None:
    """Each keeps what it would in a plan of its own kind, since probes see the whole prompt."""
    scorers: list[Scorer] = [FILLER, KeyNorm(), AGAIN]
    ids = text()

    def held(actions: Any) -> list[list[Tensor]]:
        with apply(tiny_llama, make_plan(actions)) as caches, torch.no_grad():
            tiny_llama(input_ids=ids)
        return [
            [layer.rows.keys[layer.rows.row(r)] for r in range(2)]
            for layer in caches[0].planned_layers
        ]

    alone = {scorer: held(KVAction(keep=0.4, scorer=scorer)) for scorer in scorers}
    mixed = {
        (layer, h): KVAction(keep=0.4, scorer=scorers[(layer + h) % 3])
        for layer in range(3)
        for h in range(2)
    }
    found = held(mixed)
    for (layer, h), action in mixed.items():
        assert torch.equal(found[layer][h], alone[action.scorer][layer][h])


@pytest.mark.parametrize("name", ["gemma3n", "qwen3-next", "gemma2"])
def test_layers_without_a_plan_are_left_as_they_were(
    tiny_decoders: Any, make_plan: Any, name: str
) -> None:
    """Windows, states, and keys that several layers read."""
    model = tiny_decoders.build(name)
    spec = describe(model, name)
    actions = {layer: KVAction(keep=1.0, scorer=FILLER) for layer in spec.planned}
    settings = {"do_sample": False, "max_new_tokens": 6}
    with torch.no_grad():
        stock = model.generate(text(), **settings)
        with apply(model, make_plan(actions, spec=spec)):
            assert torch.equal(model.generate(text(), **settings), stock)


def test_prompts_that_cannot_be_probed_are_refused(tiny_llama: Any, make_plan: Any) -> None:
    plan = make_plan(KVAction(keep=0.5, scorer=AGAIN))
    with torch.no_grad():
        cache = PlanCache(plan)
        with attending(tiny_llama):
            tiny_llama(input_ids=text(), past_key_values=cache)
            with pytest.raises(UnsupportedError, match="which only `apply` reads"):
                tiny_llama(input_ids=text(1), past_key_values=cache)
        with (
            pytest.raises(UnsupportedError, match="whole prompt at once"),
            apply(tiny_llama, plan, prefill_chunk=8),
        ):
            tiny_llama(input_ids=text())
        with (
            pytest.raises(UnsupportedError, match="position 512 of a model that knows 512"),
            apply(tiny_llama, plan),
        ):
            tiny_llama(input_ids=text(495))
        mask = torch.ones(1, 1, S, S).bool().tril()
        with (
            pytest.raises(UnsupportedError, match="needs input_ids"),
            apply(tiny_llama, plan),
        ):
            tiny_llama(input_ids=text(), attention_mask=mask)
    assert probe_fits(tiny_llama, AGAIN, 494)
    assert not probe_fits(tiny_llama, AGAIN, 495)


def test_texts_of_a_batch_are_probed_alone(tiny_llama: Any, make_plan: Any) -> None:
    """Also where one has been read again to its end while the other has not."""
    plan = make_plan(KVAction(keep=0.4, scorer=AGAIN))
    long, short = text(S, seed=5), text(14, seed=6)
    pad = torch.zeros(1, S - 14, dtype=torch.long)
    for padded in (torch.cat([pad, short], 1), torch.cat([short, pad], 1)):
        ids = torch.cat([long, padded])
        mask = (ids != 0).long()
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        with apply(tiny_llama, plan) as caches, torch.no_grad():
            tiny_llama(input_ids=ids, attention_mask=mask, position_ids=place)
            together = caches[0]
            for b, own in enumerate((long, short)):
                tiny_llama(input_ids=own)
                for a, c in zip(together.planned_layers, caches[0].planned_layers, strict=True):
                    for h in range(2):
                        found = a.rows.keys[a.rows.row(2 * b + h)]
                        torch.testing.assert_close(found, c.rows.keys[c.rows.row(h)])
