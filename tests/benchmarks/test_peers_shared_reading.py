"""Contexts that are read once for all arms leave every arm what its own reading would."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from cacheplan.profilers.prompts import Prompt
from cacheplan.runtime import apply
from cacheplan.types import (
    AccumulatedAttention,
    KeyDifference,
    KVAction,
    ProbeAttention,
    WindowAttention,
)

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
PLAN = {
    "window": KVAction(keep=0.25, scorer=WindowAttention(window=8), recent=8),
    "heads compete": KVAction(keep=0.25, scorer=WindowAttention(window=8), split="adaptive"),
    "filler behind it": KVAction(keep=0.25, scorer=ProbeAttention(tokens=6)),
    "read again": KVAction(
        keep=0.25, scorer=ProbeAttention(content="prompt", tokens=16, reduce="max"), sinks=2
    ),
}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PEERS))
    return importlib.import_module


def prompt(seed: int, length: int = 48) -> Prompt:
    ids = torch.randint(1, 97, (length + 9,), generator=torch.Generator().manual_seed(seed))
    return Prompt(tuple(ids[:length].tolist()), tuple(ids[length:].tolist()), ((3, 4),))


def alone(model: Any, plan: Any, text: Prompt) -> torch.Tensor:
    """Logits of the continuation after `apply` itself has read the context."""
    at = torch.arange(len(text.continuation) - 1)[None] + len(text.context)
    with apply(model, plan) as made, torch.no_grad():
        model.model(input_ids=torch.tensor([text.context]))
        ids = torch.tensor([text.continuation[:-1]])
        logits = model(input_ids=ids, past_key_values=made[-1], position_ids=at).logits[0]
        assert isinstance(logits, torch.Tensor)
        return logits


@pytest.mark.parametrize("name", PLAN)
def test_a_context_read_for_another_plan_gives_the_same_bits(
    module: Any, tiny_llama: Any, make_plan: Any, name: str
) -> None:
    ours, measure = module("kv_ours"), module("kv_measure")
    contexts = module("kv_replay").Contexts(tiny_llama.model)
    plan, text = make_plan(PLAN[name]), prompt(1)
    other = make_plan(KVAction(keep=0.5, scorer=KeyDifference()))
    again = make_plan(KVAction(keep=0.6, scorer=PLAN[name].scorer))
    for first in (other, again):  # the context, then also the probes of it, are known
        arm = ours.planned_arm("first", first, contexts)
        with arm.following(tiny_llama), torch.no_grad():
            arm.read(tiny_llama, torch.tensor([text.context]))
    arm = ours.planned_arm("second", plan, contexts)
    with arm.following(tiny_llama), torch.no_grad():
        held = arm.read(tiny_llama, torch.tensor([text.context]))
        assert held.cache.nbytes == held.cache.planned_bytes
        found = measure.continued(tiny_llama, held.cache, text, None)
    assert torch.equal(found, alone(tiny_llama, plan, text))


def test_later_contexts_replace_earlier_ones(module: Any, tiny_llama: Any, make_plan: Any) -> None:
    ours, contexts = module("kv_ours"), module("kv_replay").Contexts(tiny_llama.model)
    plan = make_plan(KVAction(keep=0.5, scorer=AccumulatedAttention()), decode_every=4)
    arm = ours.planned_arm("evicting", plan, contexts)
    for seed in (1, 2, 3, 1):
        text = prompt(seed)
        with arm.following(tiny_llama), torch.no_grad():
            held = arm.read(tiny_llama, torch.tensor([text.context]))
        assert held.cache.tokens == [len(text.context)]
        assert len(contexts.known) <= 2
        assert tuple(text.context) in contexts.known


def test_bytes_after_a_step_are_counted_where_asked(module: Any, tiny_llama: Any) -> None:
    measure, report, arm = module("kv_measure"), module("kv_report"), module("kv_ours").full_arm()
    text = prompt(4)
    reference = measure.full_logits(tiny_llama, text)
    seen = measure.measure(tiny_llama, arm, text, reference)
    unseen = measure.measure(tiny_llama, arm, text, reference, stepped=False)
    assert unseen.stepped is None
    assert (unseen.kl, unseen.right) == pytest.approx((seen.kl, seen.right), abs=1e-6)
    scores = [vars(seen), vars(unseen)]
    assert report._share(scores, scores, "stepped") == 1.0
    half = [{"stepped": seen.stepped // 2}, {"stepped": None}]
    assert report._share(half, scores, "stepped") == pytest.approx(0.5)
