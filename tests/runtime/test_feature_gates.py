"""Guards turn planned skips into computations, and never the other way round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cacheplan.adapters.calls import sample
from cacheplan.adapters.loop import watching
from cacheplan.errors import UnsupportedError
from cacheplan.runtime import apply
from cacheplan.types import FeatureEntry, FeaturePlan, Gate, Rescale

MakeEntry = Callable[..., FeatureEntry]
MakePlan = Callable[..., FeaturePlan]

NEVER, ALWAYS = 0.0, 1e30  # thresholds
STEPS = 6


CURVE = Rescale(coefficients=(4.0, 0.5, 0.1), low=0.0, high=3.0)


def gate(signal: str, threshold: float, **settings: Any) -> Gate:
    if signal == "modulation":
        settings = {"rescale": CURVE, **settings}
    return Gate(signal=signal, threshold=threshold, **settings)


@pytest.fixture(scope="module")
def tail(entry: MakeEntry) -> list[FeatureEntry]:
    """All but the first block of Wan are left out after the first step."""
    return [entry("delta", 1, 3, step) for step in range(1, STEPS)]


@pytest.fixture(scope="module")
def everything(entry: MakeEntry) -> list[FeatureEntry]:
    return [entry("model", 0, 3, step) for step in range(1, STEPS)]


SIGNALS = ["first_block", "forecast", "modulation", "secant"]


@pytest.mark.parametrize("signal", SIGNALS)
def test_threshold_zero_computes_everything(
    signal: str, family: Any, tail: list[FeatureEntry], feature_plan: MakePlan
) -> None:
    model = family("wan")
    with apply(model.pipe, feature_plan(model.spec, tail, gate(signal, NEVER))) as report:
        assert torch.equal(model.run(), model.full)
    assert report.promoted == [1, 2, 3, 4, 5]
    assert report.flops == report.full_flops


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_high_threshold_leaves_the_plan_as_it_is(
    signal: str, family: Any, tail: list[FeatureEntry], feature_plan: MakePlan
) -> None:
    model = family("wan")
    with apply(model.pipe, feature_plan(model.spec, tail[1:])):
        expected = model.run()
    with apply(model.pipe, feature_plan(model.spec, tail[1:], gate(signal, ALWAYS))) as report:
        assert torch.equal(model.run(), expected)
        assert torch.equal(model.run(), expected)
    assert report.promoted == []
    assert report.flops == report.planned_flops


def test_limits_hold_whatever_the_signal_says(
    family: Any, tail: list[FeatureEntry], feature_plan: MakePlan
) -> None:
    model = family("wan")
    limits = {
        "warmup": (3, [1, 2]),
        "protect_last": (2, [4, 5]),
        "max_consecutive": (2, [3]),
    }
    for name, (value, promoted) in limits.items():
        guard = gate("first_block", ALWAYS, **{name: value})
        with apply(model.pipe, feature_plan(model.spec, tail, guard)) as report:
            model.run()
        assert report.promoted == promoted, name


def test_the_first_block_gate_is_first_block_cache(
    family: Any, tail: list[FeatureEntry], feature_plan: MakePlan
) -> None:
    """The same skips and the same latents as ParaAttention's rule, written out here."""
    model = family("wan")
    residuals: list[Tensor] = []

    def note(module: Any, args: Any, output: Tensor) -> None:
        residuals.append(output - args[0])

    block = model.pipe.transformer.blocks[0]
    changes = []
    for threshold in (0.5, 0.2, 0.1, 0.05):
        residuals.clear()
        plan = feature_plan(model.spec, tail, gate("first_block", threshold))
        hook = block.register_forward_hook(note)
        with apply(model.pipe, plan) as report:
            model.run()
        hook.remove()
        assert len(residuals) == 2 * STEPS  # the first block runs in every call
        kept, skipped = residuals[0], []
        for step, now in enumerate(residuals[::2]):
            change = ((now - kept).abs().mean() / kept.abs().mean()).item()
            if step and change < threshold:
                skipped.append(step)
            else:
                kept = now
        assert [s for s in range(1, STEPS) if s not in report.promoted] == skipped
        changes.append(len(skipped))
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > changes[-1]


def test_more_blocks_and_sums_skip_less(
    family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    model = family("wan")
    entries = [entry("delta", 2, 3, step) for step in range(1, STEPS)]

    def skipped(**settings: Any) -> int:
        plan = feature_plan(model.spec, entries, gate("first_block", 0.3, **settings))
        with apply(model.pipe, plan) as report:
            model.run()
        return STEPS - 1 - len(report.promoted)

    assert skipped(blocks=2, accumulate="sum") <= skipped(blocks=2)
    assert skipped(blocks=1, accumulate="sum") <= skipped(blocks=1)


def test_the_forecast_gate_spares_all_other_blocks(
    family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    model = family("wan")
    line = {"do": "forecast", "basis": "taylor", "order": 1}
    entries = [entry("hidden", 0, 3, step, **line) for step in range(2, STEPS)]
    plan = feature_plan(model.spec, entries)
    with apply(model.pipe, plan):
        expected = model.run()
    gated = replace(plan, gate=gate("forecast", ALWAYS, order=1))
    first = model.spec.blocks[0].cost // 2  # runs in the first of a step's two calls
    with apply(model.pipe, gated) as report:
        assert model.count()[0] == report.planned_flops + 4 * first
        assert torch.equal(model.run(), expected)
    assert report.gate_bytes > 0


def test_the_forecast_gate_measures_as_cg_taylor_does(
    family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    model = family("wan")
    entries = [entry("hidden", 0, 3, step) for step in range(2, STEPS)]
    outputs: list[Tensor] = []
    hook = model.pipe.transformer.blocks[0].register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    found = set()
    for threshold in (1.2, 0.8, 0.5):
        outputs.clear()
        plan = feature_plan(model.spec, entries, gate("forecast", threshold, order=1))
        with apply(model.pipe, plan) as report:
            model.run()
        first = iter(outputs)
        kept: list[tuple[int, Tensor]] = []
        promoted = []
        for t in range(STEPS):
            y = next(first)
            if t > 1:
                (j, b), (i, a) = kept[-1], kept[-2]
                error = (b + (t - j) * (b - a) / (j - i) - y).abs().mean() / y.abs().mean()
                if error >= threshold:
                    promoted.append(t)
            if t < 2 or t in promoted:
                kept.append((t, y))
                next(first)  # the other branch is computed too
        assert report.promoted == promoted
        found.add(tuple(promoted))
    hook.remove()
    assert len(found) > 1


def test_the_secant_gate_measures_as_easycache_does(
    family: Any, everything: list[FeatureEntry], feature_plan: MakePlan
) -> None:
    model = family("wan")
    x: list[Tensor] = []
    v: list[Tensor] = []

    def on_call(loop: Any, inner: Any, args: Any, kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if loop.call == 0:
            x.append(kwargs["hidden_states"].clone())
            v.append(sample(output).clone())
        return output

    threshold = 0.6
    plan = feature_plan(model.spec, everything, gate("secant", threshold, accumulate="sum"))
    with apply(model.pipe, plan) as report, watching(model.pipe, on_call=on_call):
        model.run()
    total, computed, promoted = 0.0, [0], []
    for t in range(1, STEPS):
        if len(computed) > 1:
            s, r = computed[-1], computed[-2]
            k = (v[s] - v[r]).abs().mean() / (x[s] - x[r]).abs().mean()
            total += (k * (x[t] - x[t - 1]).abs().mean() / v[s].abs().mean()).item()
        if len(computed) == 1 or total >= threshold:
            computed.append(t)
            promoted.append(t)
            total = 0.0
    assert report.promoted == promoted
    assert 1 < len(promoted) < STEPS - 1


@pytest.fixture(scope="module")
def stack(entry: MakeEntry) -> list[FeatureEntry]:
    """All of Wan's blocks are left out after the first step, as TeaCache does."""
    return [entry("delta", 0, 3, step) for step in range(1, STEPS)]


def test_the_modulation_gate_measures_as_teacache_does(
    family: Any, stack: list[FeatureEntry], feature_plan: MakePlan
) -> None:
    """The same skips as the authors' rule, written out here; and the latents of those skips."""
    model = family("wan")
    inputs: list[Tensor] = []
    hook = model.pipe.transformer.blocks[0].attn1.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0])
    )
    found = set()
    for threshold in (0.1, 0.6, 1.5, 4.0):
        inputs.clear()
        guard = gate("modulation", threshold, accumulate="sum", warmup=1, protect_last=1)
        with apply(model.pipe, feature_plan(model.spec, stack, guard)) as report:
            latent = model.run()
        seen, total, skipped = iter(inputs), 0.0, []
        before = next(seen)
        next(seen)  # the other branch is computed too
        for t in range(1, STEPS):
            now = next(seen)
            change = ((now - before).abs().mean() / before.abs().mean()).item()
            total += 4 * change**2 + 0.5 * change + 0.1
            before = now
            if t < STEPS - 1 and total < threshold:
                skipped.append(t)
            else:
                total = 0.0
                next(seen)
        assert report.promoted == [t for t in range(1, STEPS) if t not in skipped]
        static = [entry for entry in stack if entry.step in skipped]
        with apply(model.pipe, feature_plan(model.spec, static)):
            assert torch.equal(model.run(), latent)
        found.add(tuple(skipped))
    hook.remove()
    assert len(found) > 2


def test_the_modulation_gate_costs_one_block_at_a_skip(
    family: Any, stack: list[FeatureEntry], feature_plan: MakePlan
) -> None:
    model = family("wan")
    first = model.spec.blocks[0].cost // 2  # runs in the first of a step's two calls
    guard = gate("modulation", ALWAYS)
    with apply(model.pipe, feature_plan(model.spec, stack[1:], guard)) as report:
        assert model.count()[0] == report.planned_flops + 4 * first
        assert report.promoted == []
    assert report.gate_bytes > 0


def test_weights_follow_the_steps_that_were_really_computed(
    family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    """A gate that computes step 2 makes a line through 1 and 2 of the one through 0 and 1."""
    model = family("wan")
    line = {"do": "forecast", "basis": "newton", "order": 1}
    planned = [entry("hidden", 0, 3, step, **line) for step in (2, 3)]
    with apply(model.pipe, feature_plan(model.spec, planned[1:])):
        expected = model.run()
    guard = gate("first_block", ALWAYS, max_consecutive=1, warmup=3)
    with apply(model.pipe, feature_plan(model.spec, planned, guard)) as report:
        assert torch.equal(model.run(), expected)
    assert report.promoted == [2]
    assert report.peak_bytes <= report.planned_bytes


def test_gates_that_cannot_decide_are_refused(
    family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    wan, unet = family("wan"), family("stable_diffusion")
    refused = [
        (wan, [entry("mlp", 0, 1, 1)], gate("first_block", 0.1), "runs the first 1 blocks"),
        (wan, [entry("model", 0, 3, 1)], gate("forecast", 0.1), "leaves out model at step 1"),
        (wan, [entry("mlp", 2, 3, 1)], gate("first_block", 0.1, blocks=3), "plan later blocks"),
        (wan, [], gate("other", 0.1), "supported is one of first_block, forecast, modulation, sec"),
        (wan, [entry("attention", 0, 1, 1)], gate("modulation", 0.1), "plan later blocks"),
        (wan, [entry("model", 0, 3, 1)], gate("modulation", 0.1), "leaves out model at step 1"),
        (wan, [], gate("secant", 0.1, accumulate="product"), "supported is none or sum"),
        (unet, [entry("branch", 1, 6, 1)], gate("first_block", 0.1), "is a UNet"),
    ]
    for model, entries, guard, words in refused:
        with (
            pytest.raises(UnsupportedError, match=words),
            apply(model.pipe, feature_plan(model.spec, entries, guard)),
        ):
            pass
