"""`cacheplan merge`: join the shards of one profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cacheplan import api
from cacheplan.cli.options import PROFILE, Json
from cacheplan.cli.profile import tell


def merge(
    parts: Annotated[
        list[Path], typer.Argument(metavar="PART", help="Files of `profile --shard`.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The profile to write.")
    ] = PROFILE,
    as_json: Json = False,
) -> None:
    """Join the shards of one profile.

    The file is the same as that of an undivided run.

    \b
    Example:
      cacheplan merge part0.safetensors part1.safetensors --out profile.safetensors
    """
    tell(api.merge(parts, out=out), out, as_json=as_json)
