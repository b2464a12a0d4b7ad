"""Oracle: what a site kept in one run stands in for the computation in the next, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cacheplan.adapters.anatomy import left_out
from cacheplan.adapters.calls import hollow, mapped, sample, tensors, with_sample
from cacheplan.adapters.denoiser import Observation, denoisers, observe, split
from cacheplan.adapters.loop import Loop, watching
from cacheplan.adapters.taps import tapped

TRANSFORMERS = (
    *("pixart", "flux", "flux2", "wan", "wan_experts", "sd3", "sd35", "cogvideox"),
    *("hunyuan_video", "ltx", "qwen_image", "sana", "dit"),
)
Kept = dict[tuple[str, int, str], Any]
# path, loop, inner, args, kwargs -> output
SiteHandler = Callable[[str, Loop, Any, tuple[Any, ...], dict[str, Any]], Any]


class Bench:
    """One pipeline, its description, and runs of it under taps."""

    def __init__(self, pipe: Any, call: dict[str, Any]) -> None:
        self.pipe, self.call = pipe, call
        self.seen: Observation = observe(pipe, call)
        self.spec = self.seen.spec
        self.full = self.run()

    def run(self) -> Tensor:
        output = self.pipe(**self.call, generator=torch.Generator().manual_seed(7))[0]
        return torch.as_tensor(output)

    @contextmanager
    def tapping(self, handlers: dict[str, SiteHandler]) -> Iterator[None]:
        with ExitStack() as stack:
            loop = stack.enter_context(watching(self.pipe))
            for name, module in denoisers(self.pipe).items():
                here = {}
                for path, handler in handlers.items():
                    denoiser, inside = split(self.pipe, path)
                    if denoiser == name:
                        here[inside] = partial(handler, path, loop)
                stack.enter_context(tapped(module, here))
            yield

    def keep(self, paths: list[str]) -> Kept:
        """Run once and keep what every path returned at every step and branch."""
        kept: Kept = {}

        def handler(path: str, loop: Loop, inner: Any, args: Any, kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            kept[path, loop.step, loop.branch] = mapped(output, Tensor.clone)
            return output

        with self.tapping(dict.fromkeys(paths, handler)):
            assert torch.equal(self.run(), self.full)
        return kept

    def replay(self, handlers: dict[str, SiteHandler]) -> Tensor:
        """Run again with handlers in place of modules, from the second step on."""

        def handler(path: str, loop: Loop, inner: Any, args: Any, kwargs: Any) -> Any:
            if loop.step == 0:
                return inner(*args, **kwargs)
            return handlers[path](path, loop, inner, args, kwargs)

        with self.tapping(dict.fromkeys(handlers, handler)):
            return self.run()


@pytest.fixture(params=TRANSFORMERS)
def bench(request: pytest.FixtureRequest, tiny_pipeline: Any) -> Bench:
    return Bench(*tiny_pipeline(request.param))


def from_kept(kept: Kept) -> SiteHandler:
    return lambda path, loop, inner, args, kwargs: kept[path, loop.step, loop.branch]


def test_parts(bench: Bench) -> None:
    blocks = bench.spec.blocks
    for kind in {part.name for block in blocks for part in block.parts}:
        paths = [f"{b.path}.{p.path}" for b in blocks for p in b.parts if p.name == kind]
        kept = bench.keep(paths)
        assert torch.equal(bench.replay(dict.fromkeys(paths, from_kept(kept))), bench.full), kind
        nothing = {key: mapped(value, torch.zeros_like) for key, value in kept.items()}
        assert not torch.equal(bench.replay(dict.fromkeys(paths, from_kept(nothing))), bench.full)


def test_blocks_by_output_and_by_delta(bench: Bench) -> None:
    paths = [block.path for block in bench.spec.blocks]
    kept = bench.keep(paths)

    def by_output(path: str, loop: Loop, inner: Any, args: Any, kwargs: Any) -> Any:
        streams = bench.seen.streams[path]
        return streams.rebuild(streams.results(kept[path, loop.step, loop.branch]))

    def by_delta(path: str, loop: Loop, inner: Any, args: Any, kwargs: Any) -> Any:
        streams = bench.seen.streams[path]
        results = streams.results(kept[path, loop.step, loop.branch])
        added = [
            None if y is None else x + (y - x)
            for x, y in zip(streams.take(args, kwargs), results, strict=True)
        ]
        return streams.rebuild(added)

    assert torch.equal(bench.replay(dict.fromkeys(paths, by_output)), bench.full)
    torch.testing.assert_close(
        bench.replay(dict.fromkeys(paths, by_delta)), bench.full, rtol=1e-3, atol=1e-3
    )


def leaves_out(bench: Bench) -> SiteHandler:
    def handler(path: str, loop: Loop, inner: Any, args: Any, kwargs: Any) -> Any:
        streams = bench.seen.streams[path]
        return streams.rebuild(streams.take(args, kwargs))

    return handler


def test_ranges_of_joined_blocks(bench: Bench) -> None:
    """The first block of a range returns what its last one returned; the others do nothing."""
    chains: list[list[str]] = []
    for block in bench.spec.blocks:
        if block.path in bench.seen.joined:
            chains[-1].append(block.path)
        else:
            chains.append([block.path])
    assert max(map(len, chains)) >= 2
    kept = bench.keep([chain[-1] for chain in chains])
    ends = {chain[0]: chain[-1] for chain in chains}

    def first(path: str, loop: Loop, inner: Any, args: Any, kwargs: Any) -> Any:
        streams, last = bench.seen.streams[path], bench.seen.streams[ends[path]]
        results = last.results(kept[ends[path], loop.step, loop.branch])
        given = streams.take(args, kwargs)
        return streams.rebuild([x if y is None else y for x, y in zip(given, results, strict=True)])

    handlers = dict.fromkeys((path for chain in chains for path in chain), leaves_out(bench))
    handlers |= dict.fromkeys(ends, first)
    assert torch.equal(bench.replay(handlers), bench.full)


def test_hidden(bench: Bench) -> None:
    """Every block is left out, and the last one of each denoiser returns what was kept."""
    paths = [block.path for block in bench.spec.blocks]
    lasts = list({split(bench.pipe, path)[0]: path for path in paths}.values())
    kept = bench.keep(lasts)

    def last(path: str, loop: Loop, inner: Any, args: Any, kwargs: Any) -> Any:
        streams = bench.seen.streams[path]
        return streams.rebuild(streams.results(kept[path, loop.step, loop.branch]))

    handlers = {**dict.fromkeys(paths, leaves_out(bench)), **dict.fromkeys(lasts, last)}
    assert torch.equal(bench.replay(handlers), bench.full)


@pytest.mark.parametrize("name", [*TRANSFORMERS, "stable_diffusion"])
def test_model(name: str, tiny_pipeline: Any) -> None:
    bench = Bench(*tiny_pipeline(name))
    kept: dict[tuple[int, str], Any] = {}

    def record(loop: Loop, inner: Any, args: Any, kwargs: Any) -> Any:
        kept[loop.step, loop.branch] = output = inner(*args, **kwargs)
        return with_sample(output, sample(output).clone())

    def replay(loop: Loop, inner: Any, args: Any, kwargs: Any) -> Any:
        output = kept[loop.step, loop.branch]
        return with_sample(output, sample(output).clone())

    with watching(bench.pipe, on_call=record):
        assert torch.equal(bench.run(), bench.full)
    with watching(bench.pipe, on_call=replay):
        assert torch.equal(bench.run(), bench.full)


def test_branch_of_a_unet(tiny_pipeline: Any) -> None:
    bench = Bench(*tiny_pipeline("stable_diffusion"))
    paths = left_out(bench.pipe.unet)
    assert paths == [block.path for block in bench.spec.blocks[1:-1]]
    kept = bench.keep(paths)

    def handler(path: str, loop: Loop, inner: Any, args: Any, kwargs: Any) -> Any:
        output = kept[path, loop.step, loop.branch]
        if path == paths[-1]:
            return output
        empty = hollow(output)
        assert all(tensor.untyped_storage().nbytes() == 4 for tensor in tensors(empty))
        return empty

    assert torch.equal(bench.replay(dict.fromkeys(paths, handler)), bench.full)
