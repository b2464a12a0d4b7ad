"""Taps change nothing by themselves, and nothing remains of them."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cacheplan.adapters.anatomy import block_paths, part_paths
from cacheplan.adapters.loop import denoisers, watching
from cacheplan.adapters.taps import Tap, compiled, intercepted, tapped

ALL = (
    *("pixart", "flux", "flux2", "wan", "wan_experts", "sd3", "sd35", "stable_diffusion"),
    *("cogvideox", "hunyuan_video", "ltx", "qwen_image", "sana", "dit"),
)


class Block(nn.Module):
    flag = True

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.ff = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn(hidden_states)
        changed: Tensor = hidden_states + self.ff(hidden_states)
        return changed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            if block.flag:
                hidden_states = block(hidden_states)
        return hidden_states


def passes(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return inner(*args, **kwargs)


def run(pipe: Any, call: dict[str, Any]) -> Tensor:
    return torch.as_tensor(pipe(**call, generator=torch.Generator().manual_seed(3))[0])


def state(module: nn.Module) -> dict[str, Any]:
    """Every module's identity, and the names in every module's `__dict__`."""
    return {name: (id(m), tuple(vars(m))) for name, m in module.named_modules()}


@pytest.mark.parametrize("name", ALL)
def test_taps_everywhere_leave_the_latents_and_the_model_as_they_are(
    name: str, tiny_pipeline: Any
) -> None:
    pipe, call = tiny_pipeline(name)
    full = run(pipe, call)
    modules = denoisers(pipe)
    before = {name: state(module) for name, module in modules.items()}
    around_scheduler = tuple(vars(pipe.scheduler))
    for module in modules.values():
        paths = block_paths(module)
        paths += [f"{path}.{part}" for path in paths for part in part_paths(module, path)]
        keys = list(module.state_dict())
        with watching(pipe), tapped(module, dict.fromkeys(paths, passes)) as taps:
            assert torch.equal(run(pipe, call), full)
            assert list(module.state_dict()) == keys
            assert all(isinstance(tap, Tap) for tap in taps.values())
    assert {name: state(module) for name, module in modules.items()} == before
    assert tuple(vars(pipe.scheduler)) == around_scheduler


def test_everything_is_restored_after_an_error() -> None:
    model = Model()
    before = state(model)

    def fails(inner: Any, args: Any, kwargs: Any) -> Any:
        raise RuntimeError("stop")

    with (
        pytest.raises(RuntimeError, match="stop"),
        tapped(model, {"blocks.0": passes, "blocks.1.attn": fails}),
        intercepted(model, passes),
    ):
        model(torch.ones(1, 8))
    assert state(model) == before
    with pytest.raises(AttributeError), tapped(model, {"blocks.0": passes, "blocks.7": passes}):
        pass
    assert state(model) == before


def test_contexts_nest() -> None:
    model, x = Model(), torch.ones(1, 8)
    before, order = state(model), []

    def says(word: str) -> Any:
        def handler(inner: Any, args: Any, kwargs: Any) -> Any:
            order.append(word)
            return inner(*args, **kwargs)

        return handler

    with tapped(model, {"blocks.0": says("inner")}), tapped(model, {"blocks.0": says("outer")}):
        model(x)
    assert order == ["outer", "inner"]
    assert state(model) == before


def test_a_tap_answers_for_its_module() -> None:
    model = Model()
    inner: Any = model.blocks[0]
    with tapped(model, {"blocks.0": passes, "blocks.0.ff": passes}):
        tap: Any = model.blocks[0]
        assert isinstance(tap, Tap)
        assert tap.flag
        assert tap.attn is inner.attn
        assert tap.ff is inner.ff  # the tap on the part
        tap.flag = False
        assert "flag" not in vars(tap)
        assert inner.flag is False
        model.eval()
        assert not tap.training
        assert not inner.training
        assert [id(p) for p in tap.parameters()] == [id(p) for p in inner.parameters()]
        model.to(torch.float64)
        assert inner.attn.weight.dtype == torch.float64
        with pytest.raises(AttributeError, match="nothing"):
            tap.nothing  # noqa: B018
    assert model.blocks[0] is inner


def test_wrapped_forwards_keep_working() -> None:
    """accelerate puts a partial in place of a module's forward; torch hooks stay on the module."""
    model, x = Model(), torch.ones(1, 8)
    block, seen = model.blocks[0], []
    plain = block.forward

    def moved(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append("moved")
        return plain(*args, **kwargs)

    block.forward = functools.partial(moved, block)
    block.register_forward_hook(lambda *_: seen.append("hook"))
    expected = model(x)
    with tapped(model, {"blocks.0": passes}):
        assert torch.equal(model(x), expected)
    assert seen == ["moved", "hook"] * 2
    with tapped(model, {"blocks.0": lambda inner, args, kwargs: args[0]}):
        model(x)
    assert len(seen) == 4


def test_an_intercepted_module_may_have_its_forward_exchanged() -> None:
    """accelerate does so when a run of an offloaded pipeline ends."""
    model, x, seen = Model(), torch.ones(1, 8), []
    expected = model(x)

    def counts(inner: Any, args: Any, kwargs: Any) -> Any:
        seen.append("call")
        return inner(*args, **kwargs)

    def exchanged(hidden_states: Tensor) -> Any:
        seen.append("exchanged")
        return Model.forward(model, hidden_states)

    with intercepted(model, counts):
        assert list(inspect.signature(model.forward).parameters) == ["hidden_states"]
        assert torch.equal(model(x), expected)
        model.forward = exchanged  # type: ignore[method-assign]
        assert torch.equal(model(x), expected)
        assert not compiled(model)
    assert seen == ["call", "call", "exchanged"]
    assert model.forward is exchanged


def test_copies_of_a_watched_scheduler_are_not_watched(tiny_pipeline: Any) -> None:
    pipe, _ = tiny_pipeline("flux")
    pipe.scheduler.set_timesteps(4)
    sample = torch.ones(1, 2, 2)
    with watching(pipe) as loop:
        assert "num_inference_steps" in inspect.signature(pipe.scheduler.set_timesteps).parameters
        copied = copy.deepcopy(pipe.scheduler)
        copied.step(sample, copied.timesteps[0], sample)
        assert copied.step_index == 1
        assert pipe.scheduler.step_index is None
        assert loop.step == 0


@torch.no_grad()
def test_compiled_code_stays_inside_of_taps() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, x = Model().eval(), torch.ones(1, 8)
    expected = model(x)
    counter = CompileCounter()
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    calls = 0

    def every_other(inner: Any, args: Any, kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return inner(*args, **kwargs) if calls % 2 else args[0]

    with tapped(model, {f"blocks.{i}": passes for i in range(3)}):
        assert torch.equal(model(x), expected)
    graphs = counter.frame_count
    with tapped(model, {f"blocks.{i}": every_other for i in range(3)}):
        for _ in range(4):
            model(x)
    assert counter.frame_count == graphs
    assert calls == 12


@torch.no_grad()
def test_taps_and_whole_models_compile_without_breaks() -> None:
    torch._dynamo.reset()
    model, x = Model().eval(), torch.ones(1, 8)
    expected = model(x)
    with tapped(model, {"blocks.0": passes, "blocks.1.attn": passes}):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
    torch._dynamo.reset()
    model.compile(backend="eager", fullgraph=True)
    calls: list[int] = []

    def counts(inner: Any, args: Any, kwargs: Any) -> Any:
        calls.append(len(calls))  # a side effect that must stay outside of the graph
        return inner(*args, **kwargs) if len(calls) != 2 else args[0]

    with intercepted(model, counts):
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), x)
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)
    assert len(calls) == 3
