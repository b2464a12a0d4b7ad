from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cacheplan.plans.diff import diff
from cacheplan.plans.io import read_plan
from cacheplan.types import FeatureAction, FeatureEntry, FeaturePlan, FeatureSite, Gate

LOADED = read_plan(Path(__file__).with_name("golden_features.json"))
assert isinstance(LOADED, FeaturePlan)
PLAN = LOADED
EMPTY = replace(PLAN, entries=())
FORECAST = FeatureAction(do="forecast", order=1, basis="taylor")


def parts(part: str, blocks: range, steps: tuple[int, ...], action: FeatureAction) -> FeaturePlan:
    return replace(
        PLAN,
        entries=tuple(
            FeatureEntry(
                site=FeatureSite(part=part, first=block, last=block + 1), step=step, action=action
            )
            for step in steps
            for block in blocks
        ),
    )


def test_equal_feature_plans_do_not_differ() -> None:
    assert diff(PLAN, PLAN) == []
    assert diff(PLAN, replace(PLAN, provenance=replace(PLAN.provenance, seed=1))) == []


def test_parts_of_feature_plans_are_compared_field_by_field() -> None:
    other = replace(
        PLAN,
        model=replace(PLAN.model, steps=20, blocks=PLAN.model.blocks * 5),
        gate=Gate(signal="forecast", threshold=0.12, max_consecutive=2, warmup=1),
        dt_scale=(),
        text_once=True,
        measured=None,
    )
    assert diff(PLAN, other) == [
        "model.blocks: 3 blocks -> 15 blocks",
        "model.steps: 8 -> 20",
        "gate.signal: first_block -> forecast",
        "dt_scale: [1.0, 1.0, 0.99, 1.0, 1.0, 1.01, 1.0, 1.0] -> []",
        "text_once: False -> True",
        "measured: (error 0.013, psnr 31.5, ssim 0.97, prompts 32, "
        f"digest sha256:{'77e2' * 16}) -> none",
    ]


def test_a_new_measurement_is_compared_number_by_number() -> None:
    assert PLAN.measured is not None
    again = replace(PLAN, measured=replace(PLAN.measured, lpips=0.02))
    assert diff(PLAN, again) == ["measured.lpips: none -> 0.02"]


def test_a_block_that_differs_is_named() -> None:
    first, *rest = PLAN.model.blocks
    blocks = (replace(first, parts=first.parts[:2]), replace(rest[0], cost=960), rest[1])
    assert diff(PLAN, replace(PLAN, model=replace(PLAN.model, blocks=blocks))) == [
        "model.blocks[0].parts: 3 parts -> 2 parts",
        "model.blocks[1].cost: 1000 -> 960",
    ]


def test_blocks_and_steps_that_change_alike_share_a_line() -> None:
    reused = parts("mlp", range(3), (2, 4, 5, 6), FeatureAction(do="reuse"))
    assert diff(EMPTY, reused) == ["mlp of blocks 0-2 at steps 2, 4-6: compute -> reuse"]
    forecast = parts("mlp", range(1, 3), (4, 5), FORECAST)
    assert diff(reused, forecast) == [
        "mlp of block 0 at steps 2, 4-6: reuse -> compute",
        "mlp of blocks 1-2 at steps 2, 6: reuse -> compute",
        "mlp of blocks 1-2 at steps 4-5: do reuse -> forecast, order 0 -> 1, basis hold -> taylor",
    ]


def test_every_kind_of_site_has_its_words() -> None:
    assert diff(PLAN, EMPTY) == [
        "delta of blocks 0-1 at step 2: reuse, scale 0.98, shift 0.01 -> compute",
        "hidden at step 4: forecast, order 2, basis newton -> compute",
        "hidden at step 5: forecast, order 1, basis fitted, weights [1.5, -0.5], "
        "channel_scale [1.0, 0.9], channel_shift [0.0, -0.1] -> compute",
        "delta of block 1 at step 6: skip -> compute",
        "mlp of block 1 at step 1: reuse -> compute",
        "attention of block 2 at step 2: forecast, order 1, basis taylor -> compute",
    ]


def test_plans_of_two_families_have_nothing_in_common() -> None:
    language = read_plan(Path(__file__).with_name("golden_plan.json"))
    assert diff(language, PLAN) == ["family: language -> diffusion"]
