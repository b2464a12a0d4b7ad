"""`cacheplan refine`: improve a plan by running its neighbours."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cacheplan import api
from cacheplan.cli.facts import plan_facts, plan_words
from cacheplan.cli.options import PLAN, PROFILE, Call, Device, Dtype, Json, Model, Prompts, Split
from cacheplan.cli.output import emit, say, suggest
from cacheplan.cli.progress import progress
from cacheplan.picture_inputs import read_settings

REFINED = Path("refined.json")


def refine(
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="The file of `cacheplan solve`.")
    ] = PLAN,
    profile: Annotated[
        Path, typer.Option(metavar="FILE", help="The profile that it was solved from.")
    ] = PROFILE,
    evaluations: Annotated[
        int | None,
        typer.Option(metavar="N", help="Measure at most so many plans; 8, or 200 schedules."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="M", help="Stop after so many minutes.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Measure each on the first N calibration prompts; 16, or 8 pictures."
        ),
    ] = None,
    prompts: Prompts = None,
    split: Split = None,
    call: Call = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The plan to write.")
    ] = REFINED,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Improve a plan by running it.

    `solve` predicts damage from measurements of one head or step at a time; this command measures
    the plan.  For a KV cache it keeps each head whole in turn, weighs heads by their share of the
    damage under the plan, and solves again.  For a diffusion model it moves one computed step at a
    time, fits all forecasts anew, and believes only what helps prompts that were left out.  The
    plan never exceeds its budget, and on these prompts it never gets worse; `cacheplan verify`
    tells what that is worth on others.

    A run that is interrupted or out of time goes on where it stopped when the same command is
    given again: OUT.part holds what was tried.  The profile's own prompts are used and no others.

    \b
    Examples:
      cacheplan refine
      cacheplan refine plan.json --minutes 10 --limit 16 --out better.json
    """
    command = ["cacheplan", "refine", str(plan), "--profile", str(profile)]
    for option, value in (("evaluations", evaluations), ("minutes", minutes), ("limit", limit)):
        if value is not None:
            command += [f"--{option}", f"{value:g}"]
    unfinished = out.with_name(out.name + ".part")
    start, found = api.load_plan(plan), api.load_profile(profile)
    with progress(str(out), "plans") as report:
        refined = api.refine(
            start,
            found,
            model=model,
            prompts=prompts,
            split=split,
            settings=read_settings(call),
            limit=limit,
            evaluations=evaluations,
            minutes=minutes,
            state=unfinished,
            device=device,
            dtype=dtype,
            command=shlex.join(command),
            progress=report,
        )
    api.save_plan(refined, out)
    if as_json:
        emit({"file": str(out), "finished": not unfinished.exists(), **plan_facts(refined)})
    else:
        print("\n".join([f"{out}: {refined.recipe} for {refined.model.id}", *plan_words(refined)]))
    if unfinished.exists():
        say(f"More could be tried: the same command with higher limits goes on from {unfinished}.")
    suggest(f"cacheplan verify {out}")
