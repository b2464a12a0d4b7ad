"""`cacheplan verify`: predicted damage beside measured damage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from cacheplan import api
from cacheplan.cli.facts import damage_facts
from cacheplan.cli.options import PLAN, Device, Dtype, Json, Limit, Model, Prompts, Split
from cacheplan.cli.output import draw, emit, say, suggest
from cacheplan.cli.progress import progress
from cacheplan.cli.tables import verification_table
from cacheplan.plans.check import kv_only


def verify(
    path: Annotated[
        Path, typer.Argument(metavar="PLAN", help="The file of `cacheplan solve`.")
    ] = PLAN,
    prompts: Prompts = None,
    limit: Limit = None,
    split: Split = 0.8,
    write: Annotated[
        bool, typer.Option("--write", "-w", help="Store the measurement in the plan file.")
    ] = False,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure a plan beside what was predicted for it.

    The prompts must not be those it was made from; the embedded model brings its own.

    \b
    Examples:
      cacheplan verify
      cacheplan verify plan.json --prompts heldout.txt --write
    """
    plan = kv_only(api.load_plan(path), "verify")
    with progress(str(path)) as report:
        found = api.verify(
            plan,
            model=model,
            prompts=prompts,
            split=split,
            limit=limit,
            device=device,
            dtype=dtype,
            progress=report,
        )
    if write:
        api.save_plan(dataclasses.replace(plan, measured=found.damage), path)
        say(f"{path} now holds the measurement.")
    if as_json:
        emit(
            {
                "file": str(path),
                "predicted": damage_facts(plan.predicted),
                "measured": damage_facts(found.damage),
                "planned_bytes": found.planned_bytes,
                "measured_bytes": found.measured_bytes,
                "full_bytes": found.full_bytes,
            }
        )
    else:
        draw(verification_table(plan, found))
    suggest(f"cacheplan show {path}")
