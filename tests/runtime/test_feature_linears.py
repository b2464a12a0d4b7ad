"""Linear layers in few bits: what they compute, and that nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cacheplan.adapters.denoiser import observe, split
from cacheplan.adapters.loop import denoisers, watching
from cacheplan.adapters.taps import Tap
from cacheplan.errors import UnsupportedError
from cacheplan.kernels.fake_quantize.naive import weights_on_grid
from cacheplan.runtime import apply
from cacheplan.types import FeatureEntry, FeaturePlan, LinearEntry, Precision, WeightAction

MakeEntry = Callable[..., FeatureEntry]
MakePlan = Callable[..., FeaturePlan]
FULL = Precision()
GIVEN = Precision(format="int", bits=8, axis="tensor")


def weight(bits: int) -> Precision:
    return Precision(format="int", bits=bits, axis="channel")


def layer(path: str, steps: int, **fields: Any) -> LinearEntry:
    action = WeightAction(weight=weight(8), activation=GIVEN)
    ranges = tuple((-1.0 - step, 2.0 + step) for step in range(steps))
    return replace(LinearEntry(path=path, action=action, ranges=ranges), **fields)


def module(pipe: Any, path: str) -> Any:
    name, own = split(pipe, path)
    return denoisers(pipe)[name].get_submodule(own)


def snapshot(pipe: Any) -> list[Any]:
    found: list[Any] = []
    for root in denoisers(pipe).values():
        for name, child in root.named_modules():
            found.append((name, id(child), dict(child._modules)))
        found += [(name, id(p), p.detach().clone().sum()) for name, p in root.named_parameters()]
    return found


@pytest.mark.parametrize("name", ["pixart", "flux", "wan_experts", "dit"])
def test_full_precision_gives_the_same_bits(name: str, family: Any, feature_plan: MakePlan) -> None:
    model = family(name)
    paths = observe(model.pipe, model.call).linears
    action = WeightAction(weight=FULL, activation=FULL)
    entries = tuple(layer(path, 6, action=action, ranges=()) for path in paths)
    before = snapshot(model.pipe)
    with apply(model.pipe, replace(feature_plan(model.spec), linears=entries)):
        assert isinstance(module(model.pipe, paths[0]), Tap)
        found = model.run()
    assert torch.equal(found, model.full)
    assert snapshot(model.pipe) == before


def test_a_layer_at_a_step(family: Any, feature_plan: MakePlan) -> None:
    """What goes in and comes out at every step, against plain NumPy."""
    model = family("pixart")
    path = "transformer_blocks.1.ff.net.2"
    target = module(model.pipe, path)
    scales = tuple(
        tuple(1 + 0.1 * step + 0.01 * c for c in range(target.out_features)) for step in range(6)
    )
    entry = layer(path, 6, channel_scale=scales, channel_shift=tuple(s[::-1] for s in scales))
    seen: list[tuple[int, Tensor, Tensor]] = []

    with apply(model.pipe, replace(feature_plan(model.spec), linears=(entry,))):
        tap = module(model.pipe, path)
        handler = vars(tap)["handler"]

        def spy(inner: Any, args: Any, kwargs: Any) -> Any:
            output = handler(inner, args, kwargs)
            seen.append((len(seen), args[0].clone(), output.clone()))
            return output

        vars(tap)["handler"] = spy
        model.run()
    assert [step for step, _, _ in seen] == list(range(6))
    rounded = weights_on_grid(target.weight.detach(), 8).double().numpy()
    for step, x, y in seen:
        low, high = entry.ranges[step]
        scale = (high - low) / 255
        zero = np.rint(-low / scale)
        codes = np.clip(np.rint(x.double().numpy() / scale) + zero, 0, 255)
        out = (codes - zero) * scale @ rounded.T + target.bias.detach().double().numpy()
        expected = out * np.array(scales[step]) + np.array(scales[step][::-1])
        # a number between two codes may take the other one in float32
        assert np.abs(expected - y.double().numpy()).max() < 2 * scale
        assert np.abs(expected - y.double().numpy()).mean() < 1e-4


def test_a_range_of_zero_leaves_activations(family: Any, feature_plan: MakePlan) -> None:
    model = family("pixart")
    action = WeightAction(weight=FULL, activation=GIVEN)
    entry = layer("proj_out", 6, action=action, ranges=((0.0, 0.0),) * 6)
    with apply(model.pipe, replace(feature_plan(model.spec), linears=(entry,))):
        assert torch.equal(model.run(), model.full)


@pytest.mark.parametrize("name", ["pixart", "dit", "wan_experts"])
def test_layers_follow_beneath_a_plan_of_parts(
    name: str, family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    """Taps of parts and layers together; and nothing stays when a run breaks off."""
    model = family(name)
    paths = observe(model.pipe, model.call).linears
    plan = feature_plan(model.spec, [entry("attention", 1, 2, 1), entry("mlp", 1, 2, 2)])
    plan = replace(plan, linears=tuple(layer(p, 6, ranges=((-9.0, 9.0),) * 6) for p in paths))
    before = snapshot(model.pipe)
    with apply(model.pipe, plan) as report:
        found = model.run()
    assert report.flops == report.planned_flops
    assert torch.isfinite(found).all()
    assert not torch.equal(found, model.full)
    assert snapshot(model.pipe) == before

    def stop(loop: Any, inner: Any, args: Any, kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        apply(model.pipe, plan),
        watching(model.pipe, on_step=stop),
    ):
        model.run()
    assert snapshot(model.pipe) == before
    assert torch.equal(model.run(), model.full)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("transformer_blocks.0.nothing", "linear layer transformer_blocks.0.nothing of PixArt"),
        ("transformer_blocks.0.norm1", "but there is LayerNorm: profile the pipeline as it is"),
        ("transformer_blocks.99.ff.net.2", "but there is none: profile the pipeline as it is now"),
    ],
)
def test_paths_that_are_no_linear_layers(
    path: str, sentence: str, family: Any, feature_plan: MakePlan
) -> None:
    model = family("pixart")
    plan = replace(feature_plan(model.spec), linears=(layer(path, 6),))
    with pytest.raises(UnsupportedError) as error, apply(model.pipe, plan):
        pass
    assert sentence in str(error.value)
    assert str(error.value).count(".") - path.count(".") == 1


@pytest.mark.parametrize("how", ["block", "whole", "wrapped"])
def test_compiled_denoisers_are_refused(
    how: str, tiny_pipelines: Any, family: Any, feature_plan: MakePlan
) -> None:
    pipe, _ = tiny_pipelines.build("pixart")
    if how == "block":
        pipe.transformer.transformer_blocks[0].compile(backend="eager")
    elif how == "whole":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    path = "transformer_blocks.0.ff.net.2"
    plan = replace(feature_plan(family("pixart").spec), linears=(layer(path, 6),))
    with pytest.raises(UnsupportedError, match=f"{path}, which is comp"), apply(pipe, plan):
        pass


def test_weights_that_are_not_in_memory(
    tiny_pipelines: Any, family: Any, feature_plan: MakePlan
) -> None:
    from cacheplan.runtime.features.linears import Linears

    pipe, _ = tiny_pipelines.build("pixart")
    block = pipe.transformer.transformer_blocks[0]
    block.ff.net[2].to("meta")
    plan = feature_plan(family("pixart").spec)
    plan = replace(plan, linears=(layer("transformer_blocks.0.ff.net.2", 6),))
    with pytest.raises(UnsupportedError, match="load the pipeline without offloading its layers"):
        Linears(plan, denoisers(pipe))
