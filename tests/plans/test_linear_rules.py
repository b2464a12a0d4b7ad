"""Plans with linear layers in few bits: written, read, compared, and refused in one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cacheplan.errors import PlanError, UnsupportedError
from cacheplan.plans.check import check, check_runnable
from cacheplan.plans.diff import diff
from cacheplan.plans.io import dumps, loads, read_plan
from cacheplan.plans.words import simulation_words
from cacheplan.types import FeaturePlan, LinearEntry, Precision, WeightAction

GOLDEN = Path(__file__).with_name("golden_features.json")
_READ = read_plan(GOLDEN)
assert isinstance(_READ, FeaturePlan)
LOADED = _READ
T = LOADED.model.steps
WEIGHT = Precision(format="int", bits=4, axis="channel")
GIVEN = Precision(format="int", bits=8, axis="tensor")
ENTRY = LinearEntry(
    path="transformer_blocks.0.ff.net.2",
    action=WeightAction(weight=WEIGHT, activation=GIVEN),
    ranges=((-1.5, 2.0),) * T,
    channel_scale=((1.0, 0.99),) * T,
    channel_shift=((0.0, 0.01),) * T,
)
OTHER = replace(ENTRY, path="proj_out", channel_scale=(), channel_shift=())
PLAN = replace(LOADED, linears=(ENTRY, OTHER))


def changed(**fields: Any) -> FeaturePlan:
    return replace(PLAN, linears=(replace(ENTRY, **fields), OTHER))


def bits(name: str, **fields: Any) -> FeaturePlan:
    own = replace(getattr(ENTRY.action, name), **fields)
    return changed(action=replace(ENTRY.action, **{name: own}))


def test_plans_with_few_bits_are_written_and_read() -> None:
    check(PLAN)
    check_runnable(PLAN)
    data = dumps(PLAN)
    assert loads(data, "plan.json") == PLAN
    assert dumps(loads(data, "plan.json")) == data
    assert b'"linears"' not in dumps(LOADED)  # old files mean the same
    assert dumps(LOADED) == GOLDEN.read_bytes()


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (changed(path=""), 'linears[0].path is "", expected a path that is not taken'),
        (changed(path="proj_out"), 'linears[1].path is "proj_out", expected a path that is not'),
        (changed(ranges=()), f"linears[0].ranges is [], expected {T} ranges, one for each step"),
        (changed(ranges=ENTRY.ranges[1:]), f"expected {T} ranges, one for each step"),
        (
            changed(ranges=((float("nan"), 1.0),) * T),
            "linears[0].ranges[0] is [NaN, 1.0], expected two finite numbers, the first at most 0",
        ),
        (changed(ranges=((0.5, 1.0),) * T), "the first at most 0, the second at least 0"),
        (bits("activation", format="model"), "linears[0].ranges is [[-1.5, 2.0], "),
        (bits("weight", bits=0), "linears[0].action.weight.bits is 0, expected an integer from 1"),
        (bits("weight", format="nf4"), 'linears[0].action.weight.format is "nf4", expected one of'),
        (changed(channel_scale=((1.0,),)), f"expected none or {T} vectors, one for each step"),
        (changed(channel_scale=((),) * T), "linears[0].channel_scale[0] is [], expected as many"),
        (
            changed(channel_scale=((1.0,), *((1.0, 1.0),) * (T - 1))),
            "linears[0].channel_scale[1] is [1.0, 1.0], expected as many channels as at step 0",
        ),
        (changed(channel_scale=((1.0,),) * T), "expected as many channels as channel_scale"),
        (
            changed(channel_shift=((0.0, float("inf")),) * T),
            "linears[0].channel_shift[0] is [0.0, Infinity], expected finite numbers",
        ),
    ],
)
def test_rules_of_linear_layers(plan: FeaturePlan, sentence: str) -> None:
    with pytest.raises(PlanError) as error:
        check(plan)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (bits("weight", bits=3), "linears[0].action.weight.bits is 3, which cannot be run yet; su"),
        (bits("weight", bits=16), "supported is 4 or 8 in linear layers"),
        (bits("activation", bits=4), "supported is 8 in linear layers"),
        (bits("weight", format="float", bits=8), 'supported is "int" or "model" in linear layers'),
        (bits("weight", axis="tensor"), 'supported is "channel" without group, residual and'),
        (bits("activation", axis="token"), 'supported is "tensor" without group'),
        (bits("weight", group=32), 'supported is "channel" without group'),
    ],
)
def test_bits_that_cannot_be_simulated(plan: FeaturePlan, sentence: str) -> None:
    check(plan)
    with pytest.raises(UnsupportedError) as error:
        check_runnable(plan)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_files_with_nan_are_refused() -> None:
    text = dumps(PLAN).decode().replace("[-1.5, 2.0]", "[NaN, 2.0]", 1)
    with pytest.raises(PlanError, match=r"linears\[0\]\.ranges\[0\]\[0\] is NaN, expected a finit"):
        loads(text.encode(), "plan.json")


def test_differences_are_told() -> None:
    assert diff(PLAN, PLAN) == []
    assert diff(LOADED, PLAN) == ["2 linear layers: full bits -> W4A8, simulated"]
    assert diff(PLAN, bits("weight", bits=8)) == [
        "transformer_blocks.0.ff.net.2: W4A8 -> W8A8, simulated"
    ]
    assert diff(PLAN, changed(channel_scale=())) == [
        "transformer_blocks.0.ff.net.2: other ranges or corrections, simulated"
    ]


def test_people_are_told_that_bits_are_simulated() -> None:
    assert simulation_words(LOADED) == ""
    words = simulation_words(bits("weight", bits=8))
    assert words == "simulated in linear layers (1 W8A8, 1 W4A8): no time or memory is saved"
