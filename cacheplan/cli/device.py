"""What every operation runs on a device, and why: `cacheplan show --device`."""

from __future__ import annotations

from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cacheplan.cli.output import draw, emit, suggest
from cacheplan.errors import InputError


def show_device(name: str, *, as_json: bool) -> None:
    """Print the table for a device of torch's; "auto" is the GPU if there is one.

    Raises InputError for devices that torch does not find here.
    """
    import torch

    from cacheplan.kernels.paths import paths

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # no such word, or no such device
        raise InputError(
            f'torch finds no device "{name}" here: name another, such as "cpu".'
        ) from error
    rows = paths(name)
    if as_json:
        emit({"device": name, "operations": [asdict(row) for row in rows]})
    else:
        table = Table("operation", "runs", "because", box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(row.name, row.implementation, row.why)
        draw(table)
    suggest("cacheplan run --plan plan.json")
