"""`cacheplan demo`: all steps on the embedded model, and published recipes beside the plan."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from cacheplan import api
from cacheplan.cli.facts import damage_facts
from cacheplan.cli.options import PLAN, PROFILE, Json, Limit
from cacheplan.cli.output import draw, emit, say, suggest
from cacheplan.cli.progress import progress
from cacheplan.cli.run import generation_words, tail
from cacheplan.cli.tables import comparison_table
from cacheplan.errors import InputError

COMPARED = ("planned", "snapkv", "keydiff", "streaming_llm")


def demo(
    budget: Annotated[
        str, typer.Option("--budget", "-b", metavar="BUDGET", help="What is kept of the cache.")
    ] = "0.2",
    folder: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Keep the files there; else nothing is kept."),
    ] = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Do it all on the embedded model, published recipes too.

    Profiles, solves, runs and verifies, then compares the plan with three published recipes at
    the same budget.

    \b
    Examples:
      cacheplan demo
      cacheplan demo --budget 0.1 --dir demo
    """
    if folder is not None:
        _make(folder)
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        _demo(Path(place), budget, limit, as_json)
    where = f" {folder / PLAN}" if folder else ""
    suggest(f"cacheplan show{where}" if folder else "cacheplan profile MODEL --prompts FILE")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be made a folder ({error.strerror}): choose another --dir."
        ) from error


def _demo(folder: Path, budget: str, limit: int | None, as_json: bool) -> None:
    say(f"1. cacheplan profile --out {folder / PROFILE}")
    with progress("   recall") as report:
        profile = api.profile(None, out=folder / PROFILE, limit=limit, progress=report)
    assert profile is not None  # only shards return nothing
    say(f"2. cacheplan solve --budget {budget}, for four recipes")
    plans = {name: api.solve(profile, budget=budget, recipe=name) for name in COMPARED}
    for name, plan in plans.items():
        api.save_plan(plan, folder / (PLAN if name == "planned" else f"{name}.json"))
    say("3. cacheplan run")
    text = api.generate(plans["planned"], on_text=None)
    say(f"   {tail(text.prompt)} -> {text.text}")
    say(f"   {generation_words(text)}")
    say("4. cacheplan verify")
    found = {}
    for name, plan in plans.items():
        with progress(f"   {name}") as report:
            found[name] = api.verify(plan, limit=limit, progress=report)
    if as_json:
        rows = {
            name: {
                "predicted": damage_facts(plans[name].predicted),
                "measured": damage_facts(result.damage),
                "measured_bytes": result.measured_bytes,
                "full_bytes": result.full_bytes,
            }
            for name, result in found.items()
        }
        emit({"budget": budget, "text": text.text, "recipes": rows})
    else:
        draw(comparison_table(found))
