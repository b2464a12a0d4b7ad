"""`cacheplan profile`: measure what a model needs from its caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from cacheplan import api
from cacheplan.cli.facts import profile_facts, profile_words
from cacheplan.cli.options import (
    PROFILE,
    Call,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Limit,
    MaxMemory,
    OffloadFolder,
    Prompts,
    Split,
    placement_of,
)
from cacheplan.cli.output import emit, suggest
from cacheplan.cli.progress import progress
from cacheplan.errors import InputError
from cacheplan.picture_inputs import STEPS, read_settings
from cacheplan.types import KVProfile, LanguageSpec, Profile


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal()):
        raise typer.BadParameter(f'"{text}" is not of the form i/n, such as 0/4.')
    return int(part), int(parts)


def profile(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Hugging Face id or folder; the embedded model if not given."
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help='"language" or "diffusion"; folders tell by themselves, hub ids are language.',
        ),
    ] = None,
    prompts: Prompts = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The profile to write.")
    ] = PROFILE,
    limit: Limit = None,
    split: Split = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Sampling steps; the pipeline's own if not given."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="G", help="Guidance scale; the pipeline's own if not given."),
    ] = None,
    call: Call = None,
    ablate: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Prompts on which each head is cut alone (8), or each step is skipped alone (4).",
        ),
    ] = None,
    gradients: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Pictures on which gradients tell how much each part of each block matters at "
            "each step (0); `cacheplan show` draws it.  Takes the memory of training.",
        ),
    ] = None,
    lags: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many steps back features are compared (16)."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens of a picture that are compared (512)."),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME",
            help="Measure only for planned and these (may be repeated), which is faster, or for "
            '"all"; if not given, for all that need no passes of their own.',
        ),
    ] = None,
    bits: Annotated[
        bool,
        typer.Option(help="Also measure keys and values in few bits (a third more time)."),
    ] = True,
    seed: Annotated[int, typer.Option(metavar="N")] = 0,
    shard: Annotated[
        str,
        typer.Option(metavar="i/n", help="Measure every n-th prompt from the i-th (from 0)."),
    ] = "0/1",
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    as_json: Json = False,
) -> None:
    """Measure what a model needs from its caches.

    Of a language model: what each head needs from the KV cache.  Of a diffusion model: how far
    each feature is from those of earlier steps, and which steps matter.  Finished prompts are
    kept when the command is interrupted; the same command goes on.  Processes that torchrun
    starts divide the prompts, one GPU each.

    \b
    Examples:
      cacheplan profile
      cacheplan profile --family diffusion
      cacheplan profile --recipe planned
      cacheplan profile Qwen/Qwen2.5-0.5B --prompts texts.txt --limit 32
      cacheplan profile ./PixArt-XL-2-512x512 --prompts pictures.txt --steps 20 --guidance 4.5
      cacheplan profile --shard 0/2 --out part0.safetensors
      torchrun --nproc-per-node 8 -m cacheplan profile Qwen/Qwen3-4B --prompts texts.jsonl
      cacheplan profile Qwen/Qwen3-32B --prompts texts.jsonl --device-map auto
    """
    with _together() as processes:
        part, parts = _shard(shard)
        settings = _settings(api.family_of(model, family), steps, guidance, call)
        first = processes.rank == 0
        with progress(str(out)) if first else nullcontext(None) as report:
            found = api.profile(
                model,
                family=family,
                prompts=prompts,
                out=out,
                split=split,
                settings=settings,
                limit=limit,
                ablate=ablate,
                gradients=gradients,
                lags=lags,
                tokens=tokens,
                seed=seed,
                shard=(part, parts),
                device=device,
                dtype=dtype,
                progress=report,
                processes=processes,
                bits=bits,
                recipes=recipe or None,
                placement=placement_of(device_map, max_memory, offload_folder),
            )
    if not first:
        return
    if found is not None:
        tell(found, out, as_json=as_json)
        return
    if as_json:
        emit({"file": str(out), "shard": shard})
    else:
        print(f"{out}: shard {shard}")
    suggest("cacheplan merge PART..., once all shards are there")


@contextmanager
def _together() -> Iterator[api.Processes]:
    """The processes of torchrun, if there are any; one of them alone says what failed."""
    processes = api.launched()
    try:
        yield processes
    except (Exception, KeyboardInterrupt):
        if processes.speaks():
            raise
        raise typer.Exit(1) from None


def _settings(
    family: str, steps: int | None, guidance: float | None, call: str | None
) -> dict[str, Any]:
    """What the options say about the call of a diffusion pipeline."""
    given = {"steps": steps, "guidance": guidance, "call": call}
    for name, value in given.items():
        if value is not None and family == LanguageSpec.family:
            raise InputError(
                f"--{name} is for diffusion models, but this is a language model: leave it out, or "
                "say --family diffusion."
            )
    settings = read_settings(call)
    if steps is not None:
        settings[STEPS] = steps
    if guidance is not None:
        settings["guidance_scale"] = guidance
    return settings


def tell(found: Profile, out: Path, *, as_json: bool) -> None:
    """Report a profile that was written to `out`."""
    if as_json:
        emit({"file": str(out), **profile_facts(found)})
    else:
        print(f"{out}: {profile_words(found)}")
    budget = "0.2" if isinstance(found, KVProfile) else "0.4"
    suggest(f"cacheplan solve{'' if out == PROFILE else f' {out}'} --budget {budget}")
