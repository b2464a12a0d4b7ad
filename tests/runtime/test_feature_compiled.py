"""Plans under torch.compile: no graph breaks, and no more graphs than ways to run a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from cacheplan.errors import UnsupportedError
from cacheplan.runtime import apply
from cacheplan.types import FeatureEntry, FeaturePlan, Gate, Rescale

MakeEntry = Callable[..., FeatureEntry]
MakePlan = Callable[..., FeaturePlan]

LINE = {"do": "forecast", "basis": "newton", "order": 1}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(family: Any, tiny_pipelines: Any, how: str) -> tuple[Any, CompileCounterWithBackend]:
    """A new Wan pipeline with the same weights, compiled; full graphs only."""
    pipe, _ = tiny_pipelines.build("wan")
    counter = CompileCounterWithBackend("eager")
    settings: dict[str, Any] = {"fullgraph": True, "backend": counter}
    if how == "blocks":
        pipe.transformer.compile_repeated_blocks(**settings)
    elif how == "wrapped":
        pipe.transformer = torch.compile(pipe.transformer, **settings)
    else:
        pipe.transformer.compile(**settings)
    return replace(family("wan"), pipe=pipe), counter


@pytest.mark.parametrize(
    ("how", "part", "graphs"),
    [("blocks", "delta", 1), ("blocks", "mlp", 4), ("wrapped", "mlp", 3), ("in place", "delta", 3)],
)
def test_compiled_denoisers_follow_a_plan(
    how: str,
    part: str,
    graphs: int,
    family: Any,
    tiny_pipelines: Any,
    entry: MakeEntry,
    feature_plan: MakePlan,
) -> None:
    eager = family("wan")
    entries = [entry(part, 1, 2, step, **LINE) for step in (1, 2, 4)]
    plan = feature_plan(eager.spec, entries)
    model, counter = compiled(family, tiny_pipelines, how)
    with apply(eager.pipe, plan):
        expected = eager.run()
    with apply(model.pipe, plan):
        assert torch.equal(model.run(), expected)
        assert counter.frame_count == graphs
        assert torch.equal(model.run(), expected)
        assert counter.frame_count == graphs  # the second run compiles nothing
    assert not counters["graph_break"]


def test_an_empty_plan_leaves_compiled_code_alone(
    family: Any, tiny_pipelines: Any, feature_plan: MakePlan
) -> None:
    model, counter = compiled(family, tiny_pipelines, "wrapped")
    full = model.run()
    found = counter.frame_count
    with apply(model.pipe, feature_plan(model.spec)):
        assert torch.equal(model.run(), full)
    assert counter.frame_count == found


def test_gates_under_compilation(
    family: Any, tiny_pipelines: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    entries = [entry("delta", 1, 3, step) for step in range(1, 6)]
    eager = family("wan")
    for how, signal in [("blocks", "first_block"), ("in place", "secant")]:
        model, _ = compiled(family, tiny_pipelines, how)
        plan = feature_plan(eager.spec, entries, Gate(signal=signal, threshold=0.4))
        with apply(eager.pipe, plan) as expected:
            latents = eager.run()
        with apply(model.pipe, plan) as report:
            assert torch.equal(model.run(), latents)
        assert report.promoted == expected.promoted
    plan = replace(plan, gate=Gate(signal="first_block", threshold=0.4))
    with (
        pytest.raises(UnsupportedError, match="decides within the denoiser, which is compiled"),
        apply(model.pipe, plan),
    ):
        pass


def test_more_ways_to_run_a_step_than_torch_compiles_are_refused(
    family: Any,
    tiny_pipelines: Any,
    entry: MakeEntry,
    feature_plan: MakePlan,
) -> None:
    model, _ = compiled(family, tiny_pipelines, "wrapped")
    sites = [("attention", 0), ("mlp", 1), ("mlp", 2)]
    entries = [entry(part, b, b + 1, step) for step, (part, b) in enumerate(sites, start=1)]
    plan = feature_plan(model.spec, entries)
    with (
        torch._dynamo.config.patch(recompile_limit=4),  # monkeypatch would hide it afterwards
        pytest.raises(UnsupportedError, match=r"recompile_limit = 5\."),
        apply(model.pipe, plan),
    ):
        pass


def test_gates_inside_of_compiled_blocks_are_refused(
    family: Any, tiny_pipelines: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    model, _ = compiled(family, tiny_pipelines, "blocks")
    curve = Rescale(coefficients=(1.0, 0.0), low=0.0, high=1.0)
    guard = Gate(signal="modulation", threshold=0.1, rescale=curve)
    plan = feature_plan(model.spec, [entry("delta", 0, 3, 2)], guard)
    with (
        pytest.raises(UnsupportedError, match=r"decides within blocks\.0, which is compiled"),
        apply(model.pipe, plan),
    ):
        pass
