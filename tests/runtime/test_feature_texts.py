"""Keys and values of the text that are computed once: the same bits for less work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cacheplan.adapters.loop import denoisers
from cacheplan.errors import UnsupportedError
from cacheplan.plans.compute import planned_flops, text_parts
from cacheplan.runtime import apply
from cacheplan.types import FeatureEntry, FeaturePlan, Gate

MakeEntry = Callable[..., FeatureEntry]
MakePlan = Callable[..., FeaturePlan]
FAMILIES = ["pixart", "wan", "wan_experts", "ltx", "sana"]
LINE = {"do": "forecast", "basis": "taylor", "order": 1}


@pytest.fixture
def once(feature_plan: MakePlan) -> MakePlan:
    """Build a plan that computes the text's keys and values once."""
    return lambda *args, **kwargs: replace(feature_plan(*args, **kwargs), text_once=True)


def other_text(call: dict[str, Any], seed: int) -> dict[str, Any]:
    """The embeddings of another prompt."""
    noise = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=noise)
        for name, value in call.items()
        if name.endswith("prompt_embeds")
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_bits_for_less_work(name: str, family: Any, once: MakePlan) -> None:
    model = family(name)
    plan = once(model.spec)
    firsts = (0, *model.spec.expert_starts)
    text = sum(text.cost for _, _, text in text_parts(model.spec.blocks)) // len(firsts)
    with apply(model.pipe, plan) as report:
        flops, latent = model.count()
    assert torch.equal(latent, model.full)
    assert flops == planned_flops(plan) == report.flops
    assert report.full_flops - flops == (model.spec.steps - len(firsts)) * text > 0
    assert report.peak_bytes == report.planned_bytes > 0
    assert torch.equal(model.run(), model.full)


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_that_leave_something_out_save_what_is_planned(
    name: str, family: Any, entry: MakeEntry, feature_plan: MakePlan, once: MakePlan
) -> None:
    model = family(name)
    L = len(model.spec.blocks)
    late = 4 if model.spec.expert_starts else 3  # step 3 is the first of another denoiser
    own = model.blocks(2)
    entries = [
        *(entry("cross_attention", b, b + 1, 1) for b in model.blocks(1)),
        entry("mlp", own[0], own[0] + 1, 2),
        entry("delta", own[1], own.stop, 2),
        entry("hidden", 0, L, late, **LINE),
        entry("model", 0, L, 5),
    ]
    with apply(model.pipe, feature_plan(model.spec, entries)):
        expected = model.run()
    plan = once(model.spec, entries)
    with apply(model.pipe, plan) as report:
        flops, latent = model.count()
    assert torch.equal(latent, expected)
    assert flops == planned_flops(plan) == report.flops
    assert report.peak_bytes <= report.planned_bytes


def test_a_gate_computes_with_the_kept_text(family: Any, entry: MakeEntry, once: MakePlan) -> None:
    model = family("pixart")
    entries = [entry("delta", 1, 3, step) for step in range(1, 6)]
    plan = once(model.spec, entries, Gate(signal="first_block", threshold=0.0))
    with apply(model.pipe, plan) as report:
        flops, latent = model.count()
    assert report.promoted == [1, 2, 3, 4, 5]
    assert torch.equal(latent, model.full)
    assert flops == report.flops == planned_flops(replace(plan, entries=()))


@pytest.mark.parametrize("name", ["pixart", "wan"])
def test_every_run_has_its_own_text(name: str, family: Any, once: MakePlan) -> None:
    model = family(name)
    texts = [other_text(model.call, seed) for seed in (1, 2)]
    expected = [model.run(**text) for text in texts]
    assert not torch.equal(*expected)
    with apply(model.pipe, once(model.spec)):
        found = [model.run(**text) for text in texts]
    assert all(map(torch.equal, found, expected))


def test_a_run_that_was_broken_off_leaves_nothing(family: Any, once: MakePlan) -> None:
    model = family("pixart")
    text = other_text(model.call, 1)

    def stop(step: int, timestep: int, latents: Tensor) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with apply(model.pipe, once(model.spec)):
        with pytest.raises(KeyboardInterrupt):
            model.run(**text, callback=stop, callback_steps=1)
        assert torch.equal(model.run(), model.full)


@pytest.mark.parametrize("name", ["pixart", "wan"])
def test_two_prompts_at_once(name: str, family: Any, once: MakePlan) -> None:
    model = family(name)
    text = other_text(model.call, 1)
    both = {
        key: torch.cat([value, text.get(key, value)])
        for key, value in model.call.items()
        if isinstance(value, Tensor)
    }
    expected = model.run(**both)
    with apply(model.pipe, once(model.spec)) as report:
        assert torch.equal(model.run(**both), expected)
    assert report.prompts == 2
    assert report.peak_bytes == report.planned_bytes


@contextmanager
def drifting(pipe: Any) -> Any:
    """The text that the blocks are given changes a little from call to call."""
    calls = 0

    def drift(module: Any, args: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output + 1e-4 * calls

    projection: Any = next(iter(denoisers(pipe).values())).get_submodule("caption_projection")
    hook = projection.register_forward_hook(drift)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["pixart", "ltx"])
def test_a_text_that_changes_is_refused(name: str, family: Any, once: MakePlan) -> None:
    model = family(name)
    with apply(model.pipe, once(model.spec)):
        with drifting(model.pipe), pytest.raises(UnsupportedError, match="The text changes"):
            model.run()
        assert torch.equal(model.run(), model.full)


def test_projections_that_are_not_called_are_refused(family: Any, once: MakePlan) -> None:
    model = family("wan")
    attention = model.pipe.transformer.blocks[1].attn2
    with apply(model.pipe, once(model.spec)):
        attention.fuse_projections()
        with pytest.raises(UnsupportedError, match=r"blocks\.1\.attn2\.to_k returns, but"):
            model.run()
        attention.unfuse_projections()
    assert torch.equal(model.run(), model.full)


@pytest.mark.parametrize(("how", "graphs"), [("blocks", 2), ("wrapped", 2)])
def test_compiled_denoisers_keep_the_text(
    how: str, graphs: int, family: Any, tiny_pipelines: Any, once: MakePlan
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    pipe, _ = tiny_pipelines.build("wan")
    counter = CompileCounterWithBackend("eager")
    settings: dict[str, Any] = {"fullgraph": True, "backend": counter}
    if how == "blocks":
        pipe.transformer.compile_repeated_blocks(**settings)
    else:
        pipe.transformer = torch.compile(pipe.transformer, **settings)
    eager = family("wan")
    model = replace(eager, pipe=pipe)
    with apply(pipe, once(eager.spec)):
        assert torch.equal(model.run(), eager.full)
        assert counter.frame_count == graphs
        other = other_text(model.call, 1)
        assert torch.equal(model.run(**other), eager.run(**other))
        assert counter.frame_count == graphs  # the second run compiles nothing
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.raises(UnsupportedError, match=r"recompile_limit = 2\."),
        apply(pipe, once(eager.spec)),
    ):
        pass
