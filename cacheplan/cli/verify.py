"""`cacheplan verify`: predicted damage beside measured damage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from cacheplan import api
from cacheplan.cli.facts import damage_facts
from cacheplan.cli.feature_tables import picture_facts, picture_table, remarks
from cacheplan.cli.options import (
    PLAN,
    Call,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Limit,
    MaxMemory,
    Model,
    OffloadFolder,
    Prompts,
    Split,
    placement_of,
)
from cacheplan.cli.output import draw, emit, say, suggest
from cacheplan.cli.progress import progress
from cacheplan.cli.tables import verification_table
from cacheplan.errors import InputError
from cacheplan.picture_inputs import read_settings
from cacheplan.plans.words import simulation_words
from cacheplan.types import FeaturePlan, KVPlan


def verify(
    path: Annotated[
        Path, typer.Argument(metavar="PLAN", help="The file of `cacheplan solve`.")
    ] = PLAN,
    prompts: Prompts = None,
    limit: Limit = None,
    split: Split = None,
    call: Call = None,
    write: Annotated[
        bool, typer.Option("--write", "-w", help="Store the measurement in the plan file.")
    ] = False,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    as_json: Json = False,
) -> None:
    """Measure a plan beside what was predicted for it.

    The prompts must not be those it was made from; the embedded models bring their own.  Plans
    for diffusion models are compared with the full run from the same noise.

    \b
    Examples:
      cacheplan verify
      cacheplan verify plan.json --prompts heldout.txt --write
    """
    plan = api.load_plan(path)
    common: dict[str, Any] = {
        "model": model,
        "prompts": prompts,
        "limit": limit,
        "device": device,
        "dtype": dtype,
        "placement": placement_of(device_map, max_memory, offload_folder),
    }
    facts: dict[str, Any]
    if isinstance(plan, KVPlan):
        if call is not None:
            raise InputError("--call is for plans of diffusion models: leave it out.")
        with progress(str(path)) as report:
            found = api.verify(plan, split=split, progress=report, **common)
        damage: Any = found.damage
        shown: list[Any] = [verification_table(plan, found)]
        facts = {
            "planned_bytes": found.planned_bytes,
            "measured_bytes": found.measured_bytes,
            "full_bytes": found.full_bytes,
        }
    else:
        settings = read_settings(call)
        with progress(str(path)) as report:
            seen = api.verify(plan, split=split, settings=settings, progress=report, **common)
        damage = seen.damage
        shown = [picture_table(plan, seen), *remarks([seen])]
        facts = picture_facts(seen)
    if write:
        api.save_plan(dataclasses.replace(plan, measured=damage), path)
        say(f"{path} now holds the measurement.")
    if as_json:
        predicted, measured = damage_facts(plan.predicted), damage_facts(damage)
        emit({"file": str(path), "predicted": predicted, "measured": measured, **facts})
    else:
        draw(*shown)
        if isinstance(plan, FeaturePlan) and (words := simulation_words(plan)):
            say(f"few bits {words}")
    suggest(f"cacheplan show {path}")
