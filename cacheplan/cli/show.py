"""`cacheplan show`: a plan or a profile as a heat map."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cacheplan import api
from cacheplan.cli.facts import (
    action_words,
    model_words,
    number,
    plan_words,
    profile_facts,
    profile_words,
)
from cacheplan.cli.heatmap import legend, plan_heatmap, sensitivity_heatmap
from cacheplan.cli.options import PLAN, PROFILE, Json
from cacheplan.cli.output import draw, emit, suggest
from cacheplan.cli.tables import damage_table
from cacheplan.plans.check import kv_only
from cacheplan.plans.codec import encode
from cacheplan.types import KVPlan, KVProfile, Plan


def show(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="A plan or a profile; plan.json if not given."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a plan or a profile as a map of layers x heads.

    \b
    Examples:
      cacheplan show plan.json
      cacheplan show profile.safetensors
    """
    if path is None:
        path = PROFILE if PROFILE.exists() and not PLAN.exists() else PLAN
    if _holds_profile(path):
        profile = api.load_profile(path)
        if as_json:
            emit({"file": str(path), **profile_facts(profile)})
        else:
            _show_profile(path, profile)
        suggest(f"cacheplan solve {path} --budget 0.2")
    else:
        plan = api.load_plan(path)
        if as_json:
            emit({"file": str(path), **encode(Plan, plan)})
        else:
            _show_plan(path, kv_only(plan, "show"))
        suggest(
            f"cacheplan verify {path} --write"
            if plan.measured is None
            else f"cacheplan run --plan {path}"
        )


def _holds_profile(path: Path) -> bool:
    """Whether a file is in the safetensors format: a length of 8 bytes, then a JSON header."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        start = b""
    return path.suffix == PROFILE.suffix or (start[8:] == b"{" and start[:1] != b"{")


def _show_plan(path: Path, plan: KVPlan) -> None:
    print("\n".join([f"{path}: {plan.recipe} for {model_words(plan.model)}", *plan_words(plan)]))
    heatmap, scorers = plan_heatmap(plan)
    print("\nkept tokens of each head in percent, and who chooses them:")
    draw(heatmap)
    print("\n".join(legend(scorers)))


def _show_profile(path: Path, profile: KVProfile) -> None:
    print(f"{path}: {profile_words(profile)}\n")
    draw(damage_table(profile, map(action_words, profile.candidates)))
    heatmap, most, keep = sensitivity_heatmap(profile)
    print(f"\nKL when one head alone is cut back, in percent of the largest ({number(most)}), and")
    print(f"the scorer that does least damage to the head when {100 * keep:g} % are kept:")
    draw(heatmap)
    print("\n".join(legend(candidate.scorer for candidate in profile.candidates)))
