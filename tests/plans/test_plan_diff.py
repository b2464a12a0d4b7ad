from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cacheplan.plans.check import kv_only
from cacheplan.plans.diff import diff
from cacheplan.plans.io import read_plan
from cacheplan.types import (
    Damage,
    Entry,
    KVAction,
    KVPlan,
    Precision,
    Random,
    Site,
    Trigger,
    WeightAction,
    WindowAttention,
)

PLAN = kv_only(read_plan(Path(__file__).with_name("golden_plan.json")), "test")


def even(keep: float, layers: int = 4) -> KVPlan:
    """Two kv heads in each layer, each with its own entry, all alike."""
    return replace(
        PLAN,
        model=replace(PLAN.model, layer_kinds=("full_attention",) * layers),
        entries=tuple(
            Entry(site=Site(layer=layer, head=head), action=KVAction(keep=keep))
            for layer in range(layers)
            for head in range(2)
        ),
    )


def with_action(plan: KVPlan, index: int, action: KVAction) -> KVPlan:
    entries = list(plan.entries)
    entries[index] = replace(entries[index], action=action)
    return replace(plan, entries=tuple(entries))


def test_equal_plans_do_not_differ() -> None:
    assert diff(PLAN, PLAN) == []
    assert diff(PLAN, replace(PLAN, provenance=replace(PLAN.provenance, seed=1))) == []


def test_parts_are_compared_field_by_field() -> None:
    other = replace(
        PLAN,
        recipe="snapkv",
        budget=replace(PLAN.budget, asked="0.5", kept=0.5),
        trigger=Trigger(decode_every=16),
        predicted=Damage(kl=0.5, recall=1.0),
        measured=None,
    )
    assert diff(PLAN, other) == [
        "recipe: planned -> snapkv",
        "budget.asked: 0.4 -> 0.5",
        "budget.kept: 0.4 -> 0.5",
        "trigger.decode_every: none -> 16",
        "predicted.kl: 0.00125 -> 0.5",
        "predicted.recall: none -> 1.0",
        "measured: (kl 0.0013, agreement 0.9975, recall 0.98, full_recall 0.99, prompts 32, "
        f"digest sha256:{'77e2' * 16}) -> none",
    ]


def test_equal_changes_share_a_line() -> None:
    a, b = even(0.2), even(0.3)
    assert diff(a, b) == ["layers 0-3, all heads: keep 0.2 -> 0.3"]
    b = with_action(b, 2, KVAction(keep=0.2))
    b = with_action(b, 5, KVAction(keep=0.3, scorer=Random(seed=3), key=Precision(bits=4)))
    assert diff(a, b) == [
        "layers 0, 3, all heads: keep 0.2 -> 0.3",
        "layer 1, head 1: keep 0.2 -> 0.3",
        "layer 2, head 0: keep 0.2 -> 0.3",
        "layer 2, head 1: keep 0.2 -> 0.3, scorer position -> random (seed 3), "
        "key default -> (bits 4)",
    ]


def test_heads_decided_together_are_compared_one_by_one() -> None:
    action = KVAction(keep=0.2, scorer=WindowAttention())
    b = replace(
        even(0.2),
        entries=(Entry(site=Site(layer=0), action=action), *even(0.2).entries[2:]),
    )
    assert diff(even(0.2), b) == [
        "layer 0, all heads: scorer position -> window_attention, heads apart -> together"
    ]


def test_sites_of_one_plan_only() -> None:
    weight = Site(layer=1, target="weight")
    b = replace(
        even(0.2, 3),
        entries=(*even(0.2, 3).entries, Entry(site=weight, action=WeightAction())),
    )
    assert diff(even(0.2), b) == [
        "model.layer_kinds: [full_attention, full_attention, full_attention, full_attention] -> "
        "[full_attention, full_attention, full_attention]",
        "layer 1, weight: only in the second plan",
        "layer 3, all heads: only in the first plan",
    ]
