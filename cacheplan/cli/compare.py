"""`cacheplan compare`: several plans of one model beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cacheplan import api
from cacheplan.cli.facts import damage_facts
from cacheplan.cli.feature_tables import picture_comparison, picture_facts
from cacheplan.cli.numbers import number, percent
from cacheplan.cli.options import (
    Call,
    Device,
    DeviceMap,
    Dtype,
    Json,
    MaxMemory,
    Model,
    OffloadFolder,
    Prompts,
    Split,
    placement_of,
)
from cacheplan.cli.output import draw, emit, say, suggest
from cacheplan.cli.progress import progress
from cacheplan.cli.tables import comparison_table
from cacheplan.errors import InputError
from cacheplan.picture_grid import check_picture_file, grid, write_picture
from cacheplan.picture_inputs import read_settings
from cacheplan.plans.check import check_model
from cacheplan.types import FeaturePlan, KVPlan, Plan

GRID = Path("compare.png")


def compare(
    files: Annotated[
        list[Path], typer.Argument(metavar="PLAN...", help="Files of `cacheplan solve`.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The pictures; compare.png."),
    ] = None,
    prompts: Prompts = None,
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, help="Use only the first N prompts.")
    ] = 4,
    split: Split = None,
    call: Call = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    as_json: Json = False,
) -> None:
    """Measure several plans of one model on the same prompts.

    Plans for a diffusion model also get a picture: a row per prompt, a column for the full run
    and one per plan, all from the same noise.

    \b
    Examples:
      cacheplan compare plan.json taylorseer.json
      cacheplan compare plan.json uniform.json -o pictures.png --limit 8
    """
    plans = [api.load_plan(file) for file in files]
    for plan in plans[1:]:
        check_model(plans[0], plan.model)
    common: dict[str, Any] = {
        "model": model,
        "prompts": prompts,
        "limit": limit,
        "device": device,
        "dtype": dtype,
    }
    placement = placement_of(device_map, max_memory, offload_folder)
    names = _names(files)
    if isinstance(plans[0], KVPlan):
        _refuse({"out": out, "call": call}, plans[0])
        common["placement"] = placement
        facts = _texts(dict(zip(names, plans, strict=True)), split, common, as_json=as_json)
    else:
        _refuse({"split": split, "device-map": placement}, plans[0])
        out = out or GRID
        check_picture_file(out)
        features = [plan for plan in plans if isinstance(plan, FeaturePlan)]
        settings = read_settings(call)
        facts = pictures(names, features, out, as_json=as_json, settings=settings, **common)
    if as_json:
        emit(facts)
    suggest(
        f"cacheplan diff {files[0]} {files[1]}" if len(files) > 1 else f"cacheplan show {files[0]}"
    )


def pictures(
    names: list[str], plans: list[FeaturePlan], out: Path | None, *, as_json: bool, **options: Any
) -> dict[str, Any]:
    """Compare plans of a diffusion model: a table on stdout and the pictures in `out`."""
    with progress("comparing") as report:
        found, rows = api.compare(plans, progress=report, **options)
    if not as_json:
        draw(picture_comparison(names, found))
    written = out is not None and all(row.pictures for row in rows)
    if out is not None and written:
        shares = [percent(result.counted_flops / result.full_flops) for result in found]
        errors = [number(result.damage.error) for result in found]
        sheet = grid(
            [row.pictures for row in rows],
            ["full run", *names],
            ["", *(f"compute {a}, error {b}" for a, b in zip(shares, errors, strict=True))],
            [f"{row.prompt.text} (seed {row.prompt.seed})" for row in rows],
        )
        write_picture(sheet, out)
        say(f"{out} shows the pictures.")
    elif out is not None:
        say("The pipeline makes no pictures, so none were written.")
    return {
        "picture": str(out) if written else None,
        "plans": {
            name: {"measured": damage_facts(result.damage), **picture_facts(result)}
            for name, result in zip(names, found, strict=True)
        },
    }


def _texts(
    plans: dict[str, Plan], split: float | None, options: dict[str, Any], *, as_json: bool
) -> dict[str, Any]:
    found = {}
    for name, plan in plans.items():
        assert isinstance(plan, KVPlan)
        with progress(name) as report:
            found[name] = api.verify(plan, split=split, progress=report, **options)
    if not as_json:
        draw(comparison_table(found))
    return {
        "plans": {
            name: {
                "measured": damage_facts(result.damage),
                "planned_bytes": result.planned_bytes,
                "measured_bytes": result.measured_bytes,
                "full_bytes": result.full_bytes,
            }
            for name, result in found.items()
        }
    }


def _names(files: list[Path]) -> list[str]:
    """Names of files without folder and ending, where these tell them apart."""
    stems = [file.stem for file in files]
    if len(set(stems)) == len(stems):
        return stems
    if len(set(files)) < len(files):
        raise InputError("A plan is given twice: name each once.")
    return [str(file) for file in files]


def _refuse(options: dict[str, object], plan: Plan) -> None:
    for name, value in options.items():
        if value is not None:
            raise InputError(f"--{name} does not fit plans for {plan.family} models: leave it out.")
