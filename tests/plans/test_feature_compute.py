from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cacheplan.plans.compute import (
    feature_size,
    full_flops,
    planned_flops,
    planned_memory,
    saved_flops,
    step_flops,
)
from cacheplan.plans.io import read_plan
from cacheplan.types import FeaturePlan, FeatureSite, TextProjections

LOADED = read_plan(Path(__file__).with_name("golden_features.json"))
assert isinstance(LOADED, FeaturePlan)
PLAN, SPEC = LOADED, LOADED.model


@pytest.mark.parametrize(
    ("part", "first", "last", "saved", "size"),
    [
        ("cross_attention", 1, 2, 150, 2048),
        ("delta", 0, 1, 1000, 2048),
        ("delta", 0, 2, 2000, 2048),
        ("branch", 1, 3, 2000, 2048),
        ("hidden", 0, 3, 3000, 2048),
        ("model", 0, 3, 3200, 1024),
    ],
)
def test_what_a_site_saves_and_takes(
    part: str, first: int, last: int, saved: int, size: int
) -> None:
    site = FeatureSite(part=part, first=first, last=last)
    assert saved_flops(SPEC, site, 1) == saved
    assert feature_size(SPEC, site) == size


def test_flops_of_a_plan() -> None:
    assert full_flops(SPEC) == 8 * 3200
    assert planned_flops(PLAN) == 8 * 3200 - (400 + 2000 + 400 + 3000 + 3000 + 1000)
    assert planned_flops(replace(PLAN, entries=())) == full_flops(SPEC)
    assert planned_flops(PLAN) / full_flops(SPEC) == PLAN.budget.reached


def test_memory_holds_what_the_highest_order_of_each_site_needs() -> None:
    # mlp 1, delta 1, attention of order 1, hidden of order 2 (its fitted one needs 2), skip none
    assert planned_memory(PLAN, 2) == 2 * 2048 * (1 + 1 + 2 + 3)
    assert planned_memory(replace(PLAN, entries=()), 2) == 0
    assert planned_memory(replace(PLAN, entries=PLAN.entries[4:]), 4) == 4 * 2048 * 2


def test_a_text_that_is_read_once() -> None:
    text = TextProjections(paths=("to_k", "to_v"), cost=60, size=500, given=70)
    blocks = tuple(
        replace(
            block,
            parts=tuple(
                replace(part, text=text if part.name == "cross_attention" else None)
                for part in block.parts
            ),
        )
        for block in SPEC.blocks
    )
    plan = replace(PLAN, model=replace(SPEC, blocks=blocks), text_once=True)
    # at seven steps less three texts; left out with blocks are 2, 3, 3 and 1 of them
    assert planned_flops(plan) == planned_flops(PLAN) - 60 * (7 * 3 - 2 - 3 - 3 - 1)
    assert step_flops(plan.model, 0, text_once=True) == 3200
    assert step_flops(plan.model, 1, text_once=True) == 3200 - 180
    for part, saved in (("cross_attention", 90), ("mlp", 400), ("delta", 940)):
        site = FeatureSite(part=part, first=1, last=2)
        assert saved_flops(plan.model, site, 4, text_once=True) == saved
    apart = replace(plan, model=replace(plan.model, expert_starts=(4,)), entries=())
    assert planned_flops(apart) == full_flops(SPEC) - 60 * 6 * 3
    assert planned_memory(plan, 2) == planned_memory(PLAN, 2) + 2 * (3 * 500 + 70)


def test_only_the_denoiser_that_runs_is_saved() -> None:
    blocks = [replace(SPEC.blocks[0], path="blocks.0", cost=10, parts=())]
    blocks += [replace(blocks[0], path="transformer_2.blocks.0", cost=30)]
    spec = replace(SPEC, blocks=tuple(blocks), expert_starts=(4,), cost=50)
    hidden = FeatureSite(part="hidden", first=0, last=2)
    assert [saved_flops(spec, hidden, step) for step in (3, 4, 5)] == [10, 30, 30]
