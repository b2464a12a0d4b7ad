"""Diffusion pipelines of diffusers: load them, describe them, refuse what is not theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cacheplan.adapters.anatomy import is_unet
from cacheplan.adapters.calls import unwrapped
from cacheplan.adapters.digest import digest
from cacheplan.adapters.dry_run import Seen, dry_run
from cacheplan.adapters.linears import linears_below
from cacheplan.adapters.loop import denoisers as denoisers
from cacheplan.adapters.offloading import Weights
from cacheplan.adapters.settings import call_settings, prompts_of, public, scheduler_settings
from cacheplan.adapters.streams import Streams
from cacheplan.errors import InputError, UnsupportedError
from cacheplan.types import Block, DiffusionSpec, Part, TextProjections

FEWEST_STEPS = 6


@dataclass(frozen=True, eq=False)
class Observation:
    """A pipeline as it is called, with what a runtime needs to know beyond its description."""

    spec: DiffusionSpec
    streams: Mapping[str, Streams]  # by path of the block
    joined: frozenset[str]  # blocks given just what the one before returned: ranges may cross
    linears: tuple[str, ...]  # layers in the blocks of transformers, then the readers
    readers: tuple[tuple[str, int], ...]  # layers behind the last block, with output channels


def load(name: str | None, *, device: str | None = None, dtype: str | None = None) -> Any:
    """Load a pipeline by hub id, folder, or embedded name; `name` None is the embedded one.

    `dtype` None is float32.  Raises InputError if it cannot be loaded and UnsupportedError if it
    has no denoiser.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise InputError(
            f"Diffusion models need the package diffusers ({error}): "
            'run `pip install "cacheplan[diffusion]"`.'
        ) from error

    from cacheplan.zoo import EMBEDDED_DIFFUSION_MODEL, embedded_path

    name = name or EMBEDDED_DIFFUSION_MODEL
    source = embedded_path(name) or name
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = getattr(torch, dtype) if dtype else torch.float32
        with _quiet():
            pipe = DiffusionPipeline.from_pretrained(source, dtype=kind).to(where)
    except (OSError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(
            f'The pipeline "{name}" could not be loaded ({reason}): give a Hugging Face id, '
            f'a folder with model_index.json and weights, or "{EMBEDDED_DIFFUSION_MODEL}".'
        ) from error
    for module in denoisers(pipe).values():
        module.eval()
    return pipe


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars while loading, and no advice on what else to install."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(lib, lib.is_progress_bar_enabled(), lib.get_verbosity()) for lib in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, shown, verbosity in before:
            library.set_verbosity(verbosity)
            if shown:
                library.enable_progress_bar()


def describe(pipe: Any, call: Mapping[str, Any], name: str | None = None) -> DiffusionSpec:
    """Describe a pipeline as it is called with the keyword arguments `call`.

    `call` holds a prompt (or embeddings, or class labels) besides the settings; costs and sizes
    are for one prompt.  `name` is the id that plans show.
    """
    return observe(pipe, call, name).spec


def observe(pipe: Any, call: Mapping[str, Any], name: str | None = None) -> Observation:
    """Describe a pipeline, and how its blocks take and return their streams."""
    run = dry_run(pipe, call)
    prompts = prompts_of(call) or run.latent[0]
    found = {
        locate(pipe, denoiser, path): seen
        for denoiser, blocks in run.blocks.items()
        for path, seen in blocks.items()
        if seen.calls == len(run.branches)
    }
    readers = tuple(
        (locate(pipe, denoiser, path), channels)
        for denoiser, own in run.readers.items()
        for path, channels in own.items()
    )
    main = unwrapped(next(iter(denoisers(pipe).values())))
    spec = DiffusionSpec(
        id=name or pipe.config.get("_name_or_path") or type(pipe).__name__,
        pipeline=type(pipe).__name__,
        architecture=type(main).__name__,
        blocks=tuple(_block(path, seen, prompts) for path, seen in found.items()),
        branches=tuple(run.branches) if len(run.branches) > 1 else ("all",),
        steps=len(run.timesteps),
        sigmas=run.sigmas,
        scheduler=scheduler_settings(pipe.scheduler),
        call=call_settings(pipe, call),
        expert_starts=tuple(run.starts),
        cost=max(run.flops.values()) // prompts,
        latent=tuple(run.latent[1:]),
        copies=max(1, run.batch // prompts),
        digest=pipeline_digest(pipe),
    )
    return Observation(
        spec,
        {path: seen.streams for path, seen in found.items() if seen.streams is not None},
        frozenset(path for path, seen in found.items() if seen.joined),
        (*_linears(pipe, spec), *(path for path, _ in readers)),
        readers,
    )


def _linears(pipe: Any, spec: DiffusionSpec) -> Iterator[str]:
    """Paths of the linear layers in the blocks of a transformer, as plans write them."""
    roots = {name: unwrapped(module) for name, module in denoisers(pipe).items()}
    for block in spec.blocks:
        name, path = split(pipe, block.path)
        if not is_unet(roots[name]):
            yield from (locate(pipe, name, own) for own in linears_below(roots[name], path))


def check_worth(spec: DiffusionSpec) -> None:
    """Raise UnsupportedError for runs so short that no step can be skipped."""
    if spec.steps < FEWEST_STEPS:
        raise UnsupportedError(
            f"{spec.pipeline} takes {spec.steps} steps, of which nothing can be skipped: "
            f"plans are for runs of {FEWEST_STEPS} steps or more."
        )


def locate(pipe: Any, denoiser: str, path: str) -> str:
    """The path of a block as plans write it: other denoisers than the first with their name."""
    return path if denoiser == next(iter(denoisers(pipe))) else f"{denoiser}.{path}"


def split(pipe: Any, path: str) -> tuple[str, str]:
    """The component name of a block's denoiser, and the block's path in it; undoes `locate`."""
    names = list(denoisers(pipe))
    for name in names[1:]:
        if path.startswith(f"{name}."):
            return name, path.removeprefix(f"{name}.")
    return names[0], path


def pipeline_digest(pipe: Any) -> str:
    """Digest of configuration and weights of all denoisers."""
    modules = [unwrapped(module) for module in denoisers(pipe).values()]
    return digest((public(module.config), Weights(module)) for module in modules)


def _block(path: str, seen: Seen, prompts: int) -> Block:
    parts, taken = [], set()
    for part, found in seen.parts.items():
        if found.calls == seen.calls and found.kind not in taken:
            taken.add(found.kind)
            cost, size = found.flops // prompts, found.size // prompts
            text = _text(found, prompts) if found.kind == "cross_attention" else None
            parts.append(Part(name=found.kind, path=part, cost=cost, size=size, text=text))
    cost, size = seen.flops // prompts, seen.size // prompts
    return Block(path=path, cost=cost, size=size, parts=tuple(parts))


def _text(part: Seen, prompts: int) -> TextProjections | None:
    own = {name: found for name, found in part.parts.items() if found.calls == part.calls}
    if not own:
        return None
    return TextProjections(
        paths=tuple(own),
        cost=sum(found.flops for found in own.values()) // prompts,
        size=sum(found.size for found in own.values()) // prompts,
        given=next(iter(own.values())).given // prompts,
    )
