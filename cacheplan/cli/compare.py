"""`cacheplan compare`: several plans or recipes of one model beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cacheplan import api
from cacheplan.cli.comparison import Arm, curves, facts, footnotes, tables
from cacheplan.cli.curves import check_curves, plot_curves
from cacheplan.cli.facts import model_words
from cacheplan.cli.numbers import number, percent
from cacheplan.cli.options import (
    PROFILE,
    Budgets,
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
    shares,
)
from cacheplan.cli.output import draw, emit, say, suggest
from cacheplan.cli.progress import progress
from cacheplan.errors import InputError
from cacheplan.frontier import solve_all
from cacheplan.picture_grid import check_picture_file, grid, write_picture
from cacheplan.picture_inputs import read_settings
from cacheplan.plans.check import check_model
from cacheplan.types import KVPlan, KVProfile, Plan

GRID = Path("compare.png")
TEXTS, PICTURES = 12, 4


def compare(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PLAN...]", help="Files of `cacheplan solve`."),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME",
            help='Also solve for this one (may be repeated), or for "all".',
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"For which recipes are solved; {PROFILE}."),
    ] = None,
    budgets: Budgets = None,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="FILE", help="Also draw damage over what is kept."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The pictures; compare.png."),
    ] = None,
    prompts: Prompts = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Only the first N prompts; 12 texts, 4 pictures."),
    ] = None,
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

    Methods are compared on equal terms by --recipe: they are solved from one profile for the same
    budgets (0.2, or 0.4 of a diffusion model's FLOPs).  Plans for a diffusion model also get a
    picture: a row per prompt, a column for the full run and one per plan, all from the same noise.
    --json adds every prompt's damage and a 95 % interval of the mean.

    \b
    Examples:
      cacheplan compare plan.json taylorseer.json
      cacheplan compare plan.json uniform.json -o pictures.png --limit 8
      cacheplan compare --recipe planned --recipe snapkv --budgets 0.1,0.2,0.5 --png curves.png
      cacheplan compare --recipe all --limit 12
    """
    if png is not None:
        check_curves(png)
    named = [
        (name, None, api.load_plan(file))
        for name, file in zip(_names(files or []), files or [], strict=True)
    ]
    solved = _solved(recipe, profile, budgets)
    plans: list[tuple[str, float | None, Plan]] = [*named, *solved]
    if not plans:
        raise InputError("Nothing was named to compare: give plan files, or recipes by --recipe.")
    first = plans[0][2]
    for _, _, plan in plans[1:]:
        check_model(first, plan.model)
    placement = placement_of(device_map, max_memory, offload_folder)
    few = TEXTS
    if isinstance(first, KVPlan):
        _refuse({"out": out, "call": call}, first)
    else:
        few = PICTURES
        _refuse({"split": split, "device-map": placement}, first)
        out = out or GRID
        check_picture_file(out)
    arms, written = measured(
        plans,
        out,
        model=model,
        prompts=prompts,
        limit=limit or few,
        split=split,
        settings=read_settings(call),
        device=device,
        dtype=dtype,
        placement=placement,
    )
    if png is not None:
        language = isinstance(first, KVPlan)
        plot_curves(
            png,
            curves(arms),
            share="share of the cache kept" if language else "share of the FLOPs computed",
            damage="KL per token, nats" if language else "error of the final latent",
            title=f"{model_words(first.model)}, {arms[0].found.damage.prompts} prompts",
        )
        say(f"{png} shows the curves.")
    if as_json:
        pictures = {} if isinstance(first, KVPlan) else {"picture": str(out) if written else None}
        emit({**pictures, "plans": {arm.label: facts(arm) for arm in arms}})
    else:
        draw(*tables(arms), *footnotes(arms))
    suggest(_following(files or []))


def measured(
    plans: Sequence[tuple[str, float | None, Plan]], out: Path | None, **options: Any
) -> tuple[list[Arm], bool]:
    """Measure plans (name, budget, plan); pictures, if there are any, go to `out`, or nowhere."""
    with progress("comparing") as report:
        found = api.compare([plan for _, _, plan in plans], progress=report, **options)
    arms = [
        Arm(name, budget, plan, result)
        for (name, budget, plan), result in zip(plans, found.found, strict=True)
    ]
    if out is None or isinstance(plans[0][2], KVPlan):
        return arms, False
    if not all(row.pictures for row in found.rows):
        say("The pipeline makes no pictures, so none were written.")
        return arms, False
    sheet = grid(
        [row.pictures for row in found.rows],
        ["full run", *(arm.label for arm in arms)],
        ["", *(f"compute {percent(arm.share)}, error {number(arm.damage)}" for arm in arms)],
        [f"{row.prompt.text} (seed {row.prompt.seed})" for row in found.rows],
    )
    write_picture(sheet, out)
    say(f"{out} shows the pictures.")
    return arms, True


def _solved(
    recipes: list[str] | None, profile: Path | None, budgets: str | None
) -> list[tuple[str, float | None, Plan]]:
    """The plans of all recipes at all budgets."""
    if not recipes:
        for name, value in {"profile": profile, "budgets": budgets}.items():
            if value is not None:
                raise InputError(f"--{name} is for recipes: add --recipe, or leave it out.")
        return []
    with progress("solving", "plans", "reading the profile") as report:
        known = api.load_profile(profile or PROFILE)
        usual = [0.2 if isinstance(known, KVProfile) else 0.4]
        found, missing = solve_all(
            known,
            recipes=recipes,
            budgets=shares(budgets) if budgets else usual,
            progress=report,
        )
    for sentence in missing:
        say(sentence)
    return [(recipe, budget, plan) for (recipe, budget), plan in found.items()]


def _following(files: Sequence[Path]) -> str:
    if len(files) > 1:
        return f"cacheplan diff {files[0]} {files[1]}"
    return f"cacheplan show {files[0]}" if files else "cacheplan solve --budget 0.2"


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
