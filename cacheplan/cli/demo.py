"""`cacheplan demo`: all steps on the embedded models, and published recipes beside the plan."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from cacheplan import api
from cacheplan.cli.compare import measured
from cacheplan.cli.comparison import facts, tables
from cacheplan.cli.feature_facts import drawing_words
from cacheplan.cli.kv_facts import generation_words, tail
from cacheplan.cli.options import PLAN, PROFILE, Json
from cacheplan.cli.output import draw, emit, say, suggest
from cacheplan.cli.progress import progress
from cacheplan.errors import InputError
from cacheplan.picture_grid import write_picture
from cacheplan.types import DiffusionSpec, FeatureProfile, KVProfile, LanguageSpec

TEXTS = ("planned", "snapkv", "keydiff", "streaming_llm")
PICTURES = ("planned", "dpcache", "taylorseer", "uniform")
BUDGETS = {LanguageSpec.family: "0.2", DiffusionSpec.family: "0.4"}


def demo(
    family: Annotated[
        str | None, typer.Option(metavar="NAME", help='Only "language" or "diffusion".')
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            metavar="BUDGET",
            help="What is kept: 0.2 of the cache, 0.4 of the computation if not given.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Keep the files there; else nothing is kept."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Use only the first N prompts; fewer pictures."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Do it all on the embedded models, published recipes too.

    Profiles, solves, runs and verifies, then compares the plan with three published recipes at
    the same budget: first for a language model's cache, then for a diffusion model's features.

    \b
    Examples:
      cacheplan demo
      cacheplan demo --family diffusion --dir demo
      cacheplan demo --budget 0.3
    """
    chosen = list(BUDGETS) if family is None else [api.family_of(None, family)]
    if folder is not None:
        _make(folder)
    found = {}
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        for name in chosen:
            within = Path(place) / name if len(chosen) > 1 else Path(place)
            _make(within)
            if len(chosen) > 1:
                say(f"{name} model:")
            step = _language if name == LanguageSpec.family else _diffusion
            kept = folder is not None
            found[name] = step(within, budget or BUDGETS[name], limit, as_json=as_json, kept=kept)
    if as_json:
        emit(found)
    at = folder / chosen[0] if folder and len(chosen) > 1 else folder
    suggest(f"cacheplan show {at / PLAN}" if at else "cacheplan profile MODEL --prompts FILE")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be made a folder ({error.strerror}): choose another --dir."
        ) from error


def _language(
    folder: Path, budget: str, limit: int | None, *, as_json: bool, kept: bool
) -> dict[str, Any]:
    say(f"1. cacheplan profile --out {folder / PROFILE}")
    with progress("   recall") as report:
        profile = api.profile(None, out=folder / PROFILE, limit=limit, progress=report)
    assert isinstance(profile, KVProfile)  # only shards return nothing
    say(f"2. cacheplan solve --budget {budget}, for four recipes")
    plans = {name: api.solve(profile, budget=budget, recipe=name) for name in TEXTS}
    for name, plan in plans.items():
        api.save_plan(plan, folder / (PLAN if name == "planned" else f"{name}.json"))
    say("3. cacheplan run")
    text = api.generate(plans["planned"], on_text=None)
    say(f"   {tail(text.prompt)} -> {text.text}")
    say(f"   {generation_words(text)}")
    say("4. cacheplan compare")
    arms, _ = measured([(name, None, plan) for name, plan in plans.items()], None, limit=limit)
    if not as_json:
        draw(*tables(arms))
    return {"budget": budget, "text": text.text, "recipes": {a.name: facts(a) for a in arms}}


def _diffusion(
    folder: Path, budget: str, limit: int | None, *, as_json: bool, kept: bool
) -> dict[str, Any]:
    say(f"1. cacheplan profile --family diffusion --out {folder / PROFILE}")
    with progress("   shapes") as report:
        profile = api.profile(
            None,
            family=DiffusionSpec.family,
            out=folder / PROFILE,
            limit=min(limit or 3, 3),
            ablate=1,
            progress=report,
        )
    assert isinstance(profile, FeatureProfile)
    say(f"2. cacheplan solve --budget {budget}, for four recipes")
    plans = [api.solve(profile, budget=budget, recipe=name) for name in PICTURES]
    for name, plan in zip(PICTURES, plans, strict=True):
        api.save_plan(plan, folder / (PLAN if name == "planned" else f"{name}.json"))
    say("3. cacheplan run")
    with progress("   planned", "steps") as report:
        drawn = api.draw(plans[0], progress=report)
    write_picture(drawn.picture, folder / "out.png")
    say(f"   {drawing_words(drawn)}")
    say("4. cacheplan compare")
    out = folder / "compare.png" if kept else None
    named = [(name, None, plan) for name, plan in zip(PICTURES, plans, strict=True)]
    arms, written = measured(named, out, limit=min(limit or 4, 4))
    if not as_json:
        draw(*tables(arms))
    return {
        "budget": budget,
        "prompt": drawn.prompt,
        "picture": str(out) if written else None,
        "plans": {arm.name: facts(arm) for arm in arms},
    }
