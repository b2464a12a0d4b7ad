"""`cacheplan profile`: measure what each head of a model needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cacheplan import api
from cacheplan.cli.facts import profile_facts, profile_words
from cacheplan.cli.options import PROFILE, Device, Dtype, Json, Limit, Prompts, Split
from cacheplan.cli.output import emit, suggest
from cacheplan.cli.progress import progress
from cacheplan.types import KVProfile


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
    prompts: Prompts = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The profile to write.")
    ] = PROFILE,
    limit: Limit = None,
    split: Split = 0.8,
    ablate: Annotated[
        int, typer.Option(metavar="N", help="Prompts on which each head is cut alone.")
    ] = 8,
    seed: Annotated[int, typer.Option(metavar="N")] = 0,
    shard: Annotated[
        str,
        typer.Option(metavar="i/n", help="Measure every n-th prompt from the i-th (from 0)."),
    ] = "0/1",
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure what each head of a model needs from its cache.

    Finished prompts are kept when the command is interrupted; the same command goes on.

    \b
    Examples:
      cacheplan profile
      cacheplan profile Qwen/Qwen2.5-0.5B --prompts texts.txt --limit 32
      cacheplan profile --shard 0/2 --out part0.safetensors
    """
    part, parts = _shard(shard)
    with progress(str(out)) as report:
        found = api.profile(
            model,
            prompts=prompts,
            out=out,
            split=split,
            limit=limit,
            ablate=ablate,
            seed=seed,
            shard=(part, parts),
            device=device,
            dtype=dtype,
            progress=report,
        )
    if found is not None:
        tell(found, out, as_json=as_json)
        return
    if as_json:
        emit({"file": str(out), "shard": shard})
    else:
        print(f"{out}: shard {shard}")
    suggest("cacheplan merge PART..., once all shards are there")


def tell(found: KVProfile, out: Path, *, as_json: bool) -> None:
    """Report a profile that was written to `out`."""
    if as_json:
        emit({"file": str(out), **profile_facts(found)})
    else:
        print(f"{out}: {profile_words(found)}")
    suggest(f"cacheplan solve{'' if out == PROFILE else f' {out}'} --budget 0.2")
