"""Files and options that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cacheplan.budget import parse_bytes
from cacheplan.errors import InputError
from cacheplan.placement import Placement

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
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="MAP",
        help='Divide a large language model over devices: "auto", or a JSON file such as '
        '{"model.embed_tokens": 0, "model.layers.0": "cpu", "model.layers.1": "disk", ...}.',
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZES", help='The most that each device may take of it: "0=10GiB,cpu=4GiB".'
    ),
]
OffloadFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where weights go that must be converted before use."),
]


Budgets = Annotated[
    str | None,
    typer.Option(metavar="SHARES", help='Shares with commas between, such as "0.1,0.2,0.5".'),
]


def shares(text: str) -> list[float]:
    """The budgets of an option; raises InputError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f'The budgets "{text}" are not numbers: write shares such as "0.1,0.2,0.5".'
        ) from None


def placement_of(
    device_map: str | None, max_memory: str | None, offload_folder: Path | None
) -> Placement | None:
    """How the options divide a model over devices, None for one device; raises InputError."""
    if device_map is None and max_memory is None and offload_folder is None:
        return None
    return Placement(
        "auto" if device_map is None else _device_map(device_map),
        None if max_memory is None else _max_memory(max_memory),
        offload_folder,
    )


def _device_map(text: str) -> str | dict[str, int | str]:
    if not text.endswith(".json"):
        return text
    try:
        found = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise InputError(
            f"The device map {text} cannot be read ({reason}): give a JSON file with the device "
            "of each module."
        ) from error
    if not isinstance(found, dict) or not all(type(v) in (int, str) for v in found.values()):
        raise InputError(
            f"The device map {text} is no object of devices by module: write something like "
            '{"model.embed_tokens": 0, "model.layers.0": "disk"}.'
        )
    return found


def _max_memory(text: str) -> dict[int | str, int]:
    found: dict[int | str, int] = {}
    for part in text.split(","):
        device, equals, size = part.strip().partition("=")
        if not (equals and (device.isdecimal() or device == "cpu")):
            raise InputError(
                f'--max-memory holds "{part}", expected a GPU\'s number or cpu, and a size: '
                '"0=10GiB,cpu=4GiB".'
            )
        found[int(device) if device.isdecimal() else device] = parse_bytes(size)
    return found
