"""Models, plans and prompts shared by the tests; nothing here touches the network."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from cacheplan.types import (
    Budget,
    Certificate,
    Entry,
    KVAction,
    ModelSpec,
    Plan,
    Provenance,
    Site,
    Trigger,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """A random three-layer Llama with grouped queries (4 query heads on 2 kv heads)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.2,  # attention far from uniform, so that evictions differ
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_spec(tiny_llama: Any) -> ModelSpec:
    from cacheplan.adapters.language import describe

    return describe(tiny_llama, "tiny")


MakePlan = Callable[..., Plan]


@pytest.fixture(scope="session")
def make_plan(tiny_spec: ModelSpec) -> MakePlan:
    """Build a plan for the tiny model from one action per layer, or per (layer, head)."""

    def build(
        actions: dict[int | tuple[int, int], KVAction] | KVAction,
        *,
        decode_every: int | None = None,
        max_rows: int | None = None,
        spec: ModelSpec = tiny_spec,
    ) -> Plan:
        if isinstance(actions, KVAction):
            actions = dict.fromkeys(range(spec.layers), actions)
        entries = tuple(
            Entry(
                site=Site(layer=at) if isinstance(at, int) else Site(layer=at[0], head=at[1]),
                action=action,
            )
            for at, action in actions.items()
        )
        weights = [spec.kv_heads if e.site.head is None else 1 for e in entries]
        keeps = [e.action.keep for e in entries if isinstance(e.action, KVAction)]
        kept = sum(w * k for w, k in zip(weights, keeps, strict=True)) / sum(weights)
        return Plan(
            model=spec,
            recipe="test",
            budget=Budget(asked=str(kept), kept=kept, reached=kept, length=100, max_rows=max_rows),
            entries=entries,
            trigger=Trigger(decode_every=decode_every),
            certificate=Certificate(solver="none", value=0.0, bound=None, gap=None, status="Test."),
            predicted=None,
            measured=None,
            provenance=Provenance(
                profile=None, prompts=None, seed=0, versions=(("cacheplan", "0"),), command=""
            ),
        )

    return build
