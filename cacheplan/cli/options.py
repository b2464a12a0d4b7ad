"""Files and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PROFILE = Path("profile.safetensors")
PLAN = Path("plan.json")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help='Such as "cpu" or "cuda:1"; the GPU if there is one.'),
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="NAME", help='Such as "bfloat16"; the checkpoint\'s own if not given.'),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        "-p",
        metavar="FILE",
        help="Texts: .txt separated by blank lines, or .jsonl.  For pictures: one prompt per line, "
        "or .jsonl of the pipeline's arguments.  Embedded models bring their own.",
    ),
]
Split = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", help="Share of a plain text's tokens that is context; 0.8 if not given."
    ),
]
Limit = Annotated[
    int | None, typer.Option(metavar="N", help="Use only the first N prompts; all if not given.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="Where the plan's model is, if moved."),
]
Call = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|JSON",
        help="Settings of the diffusion pipeline's call, such as '{\"height\": 512}'.",
    ),
]
