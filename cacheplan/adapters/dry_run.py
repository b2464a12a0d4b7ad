"""One run through a pipeline's sampling loop that shows what its denoisers are made of.

Each denoiser computes a single step, under taps that count; in its other steps it returns the
same again, at no cost.  So the run is short even where two experts take turns, and the pipeline
ends its loop in the ordinary way.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cacheplan.adapters.anatomy import block_paths, is_unet, part_paths, text_projections
from cacheplan.adapters.calls import latent, named, sample, tensors, unwrapped, with_sample
from cacheplan.adapters.flops import flop_counter, uncompiled
from cacheplan.adapters.linears import given, linears_outside
from cacheplan.adapters.loop import Loop, denoisers, watching
from cacheplan.adapters.streams import Streams, joined, observe
from cacheplan.adapters.taps import replaced, tapped
from cacheplan.errors import UnsupportedError


@dataclass
class Seen:
    """A block, a part or a projection of the text, counted over its calls in one step."""

    kind: str = ""  # of a part
    calls: int = 0
    flops: int = 0
    size: int = 0  # numbers in what it returns
    given: int = 0  # numbers that a projection is given
    streams: Streams | None = None
    joined: bool = True  # given exactly what the block before it returned
    parts: dict[str, Seen] = field(default_factory=dict)


class DryRun:
    """What was seen of each denoiser, by its name; `blocks` are in order of execution."""

    def __init__(self) -> None:
        self.blocks: dict[str, dict[str, Seen]] = {}
        self.readers: dict[str, dict[str, int]] = {}  # path and output channels, see `_reader`
        self.flops: dict[str, int] = {}  # of one step
        self.starts: list[int] = []  # steps at which another denoiser takes over
        self.branches: list[str] = []
        self.latent: torch.Size = torch.Size()  # as the scheduler gets it, with the batch
        self.batch = 0  # of the denoiser's calls
        self.timesteps: tuple[float, ...] = ()
        self.sigmas: tuple[float, ...] = ()
        self._counter: FlopCounterMode | None = None
        self._computed: dict[str, int] = {}  # which step each denoiser computed
        self._outputs: dict[tuple[str, str], tuple[torch.Size, Any]] = {}
        self._branches: list[str] = []  # of the present step
        self._before: tuple[Tensor | None, ...] = ()  # what the last block returned
        self._readers: dict[str, int] = {}  # of the present denoiser

    def on_call(self, loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._branches.append(loop.branch)
        if loop.denoiser not in self._computed:
            if self._computed:
                if loop.call:
                    raise self._changing(loop)
                self.starts.append(loop.step)
            self._computed[loop.denoiser] = loop.step
            self.flops[loop.denoiser] = 0
        shape = latent(loop.module, args, kwargs).shape
        self.batch = shape[0]
        key = loop.denoiser, loop.branch
        if self._computed[loop.denoiser] != loop.step:
            seen, output = self._outputs.get(key, (None, None))
            if seen != shape or list(self._computed)[-1] != loop.denoiser:
                raise self._changing(loop)
            return with_sample(output, sample(output).clone())
        self._before, self._readers = (), self.readers[loop.denoiser]
        with flop_counter() as self._counter:
            output = inner(*args, **kwargs)
        self.flops[loop.denoiser] += self._counter.get_total_flops()
        self._outputs[key] = shape, with_sample(output, sample(output).clone())
        return output

    def on_step(self, loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if loop.step == 0:
            self.branches = self._branches
            given = inspect.signature(inner).bind(*args, **kwargs).arguments
            self.latent = given["sample"].shape
            self.timesteps, self.sigmas = loop.timesteps, loop.sigmas
        if self._branches != self.branches:
            raise self._changing(loop)
        self._branches = []
        return inner(*args, **kwargs)

    def _changing(self, loop: Loop) -> UnsupportedError:
        return UnsupportedError(
            f"The calls of the denoiser change at step {loop.step}, but plans need the same calls "
            "at every step: turn off guidance that starts or ends within the run."
        )

    def handlers(self, name: str, denoiser: nn.Module) -> dict[str, Any]:
        """Counting taps for every block and part of the denoiser called `name`."""
        seen = self.blocks[name] = {}
        self.readers[name] = {}
        found: dict[str, Any] = {}
        for path in block_paths(denoiser):
            parts = part_paths(denoiser, path)
            found[path] = partial(self._block, seen, path, parts, is_unet(denoiser))
            for part, kind in parts.items():
                found[f"{path}.{part}"] = partial(self._part, seen, path, part)
                if kind == "cross_attention":
                    for own in text_projections(denoiser, f"{path}.{part}"):
                        tap = partial(self._projection, seen, path, part, own)
                        found[f"{path}.{part}.{own}"] = tap
        for path in linears_outside(denoiser, block_paths(denoiser)):
            found[path] = partial(self._reader, path)
        return found

    def _block(
        self,
        seen: dict[str, Seen],
        path: str,
        parts: Mapping[str, str],
        unet: bool,
        inner: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        block = seen.setdefault(path, Seen())  # the first call decides about the order
        for part, kind in parts.items():
            block.parts.setdefault(part, Seen(kind))
        self._readers.clear()  # so that those behind the last block remain
        output = self._count(block, inner, args, kwargs)
        if unet:  # of the skip connections nothing is kept
            block.size += tensors(output)[0].numel()
            block.joined = False
            return output
        streams = block.streams = observe(inner, args, kwargs, output)
        block.joined &= joined(self._before, streams.take(args, kwargs))
        self._before = streams.results(output)
        block.size += sum(tensor.numel() for tensor in self._before if tensor is not None)
        return output

    def _part(
        self,
        seen: dict[str, Seen],
        path: str,
        name: str,
        inner: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        part = seen[path].parts[name]
        text = named(inner, args, kwargs).get("encoder_hidden_states")
        if name.endswith("attn2") and text is None:  # SD3.5's second self-attention
            part.kind = "attention_2"
        if "Parallel" in type(inner).__name__:  # FLUX.2's single blocks: attention and mlp in one
            part.kind = "fused"
        output = self._count(part, inner, args, kwargs)
        part.size += sum(tensor.numel() for tensor in tensors(output))
        return output

    def _reader(
        self, path: str, inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A linear layer outside of the blocks: what it is given may be what the last returned."""
        output, shape = inner(*args, **kwargs), given(args, kwargs).shape
        for stream in self._before:
            if stream is not None and (stream.ndim, stream.shape[-1]) == (len(shape), shape[-1]):
                self._readers[path] = output.shape[-1]
        return output

    def _projection(
        self,
        seen: dict[str, Seen],
        path: str,
        part: str,
        name: str,
        inner: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        own = seen[path].parts[part].parts.setdefault(name, Seen())
        output = self._count(own, inner, args, kwargs)
        own.given += given(args, kwargs).numel()
        own.size += output.numel()
        return output

    def _count(
        self, seen: Seen, inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        assert self._counter is not None
        seen.calls += 1
        before = self._counter.get_total_flops()
        output = inner(*args, **kwargs)
        seen.flops += self._counter.get_total_flops() - before
        return output


def dry_run(pipe: Any, call: Mapping[str, Any]) -> DryRun:
    """Run the pipeline once with the keyword arguments `call`, computing as little as possible."""
    run = DryRun()
    accepted = inspect.signature(type(pipe).__call__).parameters
    own = {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    call = {**{name: value for name, value in own.items() if name in accepted}, **call}
    silent = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
    with ExitStack() as stack:
        stack.enter_context(replaced(pipe, {"_progress_bar_config": silent}))
        modules = denoisers(pipe)
        for module in modules.values():
            stack.enter_context(uncompiled(module))
        watched = watching(pipe, on_call=run.on_call, on_step=run.on_step)
        loop = stack.enter_context(watched)
        for name, module in modules.items():
            root = unwrapped(module)
            stack.enter_context(tapped(root, run.handlers(name, root)))
        pipe(**call)
    if loop.run != 1 or loop.step != loop.steps:
        raise UnsupportedError(
            f"{type(pipe).__name__} took {loop.step} of {loop.steps} steps in {loop.run} runs of "
            "its sampling loop, but plans are for one whole run per call."
        )
    return run
