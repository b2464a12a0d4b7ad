"""The comparison with other caches treats every arm alike; runs without the peers themselves."""

from __future__ import annotations

import importlib
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cacheplan.adapters.language import LanguageModel, load
from cacheplan.zoo import embedded_prompts

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.fixture(scope="module")
def loaded() -> LanguageModel:
    return load(None)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PEERS))
    return importlib.import_module


def test_fresh_prompts_are_nobody_elses(module: Any, loaded: LanguageModel) -> None:
    prompts_of = module("kv_prompts").prompts_of
    fresh = {prompt.context for prompt in prompts_of(None, loaded.tokenizer, 30)}
    assert len(fresh) == 30
    for split in ("calibration", "heldout"):
        file = embedded_prompts("recall", split)
        assert not fresh & {prompt.context for prompt in prompts_of(file, loaded.tokenizer, 48)}


def test_a_question_inside_the_context_is_the_same_text(module: Any, loaded: LanguageModel) -> None:
    prompts = module("kv_prompts")
    prompt = prompts.prompts_of(None, loaded.tokenizer, 1)[0]
    inside = prompts.asked_inside(prompt)
    text = prompt.context + prompt.continuation
    moved = inside.context + inside.continuation
    assert moved == text[: len(moved)]
    (start, end), (first, last) = inside.answers[0], prompt.answers[0]
    assert inside.continuation[start:end] == prompt.continuation[first:last]
    assert prompts.asked_inside(replace(prompt, answers=())) is None


def test_storages_count_once_and_in_16_bits(module: Any) -> None:
    stored_bytes = module("kv_measure").stored_bytes
    keys = torch.zeros(10, 4)
    packed = torch.zeros(7, dtype=torch.uint8)
    layer = SimpleNamespace(keys=keys[:3], again=keys, parts=[(packed, {"scale": packed[:2]})])
    cache = SimpleNamespace(layers=[layer, SimpleNamespace(half=torch.zeros(5).bfloat16())])
    assert stored_bytes(cache) == 10 * 4 * 2 + 7 + 5 * 2


def test_the_full_cache_does_no_damage_however_it_is_read(
    module: Any, loaded: LanguageModel
) -> None:
    measure = module("kv_measure")
    arm = module("kv_ours").full_arm()
    prompt = module("kv_prompts").prompts_of(None, loaded.tokenizer, 1)[0]
    reference = measure.full_logits(loaded.model, prompt)
    spec = loaded.spec
    row = spec.layers * spec.kv_heads * (spec.key_width + spec.value_width) * 2
    for every in (None, 16):
        score = measure.measure(loaded.model, replace(arm, every=every), prompt, reference)
        assert score.kl < 1e-6
        assert score.agreement == 1.0
        assert score.right <= score.answers == len(prompt.answers)
        assert score.logical == score.physical == len(prompt.context) * row
        assert score.stepped == score.physical + row
    assert measure.stepwise_difference(loaded.model, arm, prompt, 4) < 1e-3


def test_pairs_make_ratios_narrow(module: Any) -> None:
    intervals = module("intervals")
    rng = random.Random(0)
    damage = [rng.expovariate(1.0) for _ in range(40)]
    low, high = intervals.mean_interval(damage)
    assert low < sum(damage) / len(damage) < high
    half = intervals.ratio_interval([value / 2 for value in damage], damage)
    assert half == pytest.approx((0.5, 0.5))
