"""`cacheplan frontier`: damage over budget, before choosing one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cacheplan import api
from cacheplan.cli.curves import check_curves, plot_curves
from cacheplan.cli.facts import model_words
from cacheplan.cli.numbers import number, percent
from cacheplan.cli.options import PROFILE, Budgets, Json, shares
from cacheplan.cli.output import draw, emit, say, suggest
from cacheplan.cli.progress import progress
from cacheplan.cli.tables import table_of
from cacheplan.frontier import BUDGETS, Point
from cacheplan.frontier import frontier as solve_frontier
from cacheplan.types import KVProfile, Profile


def frontier(
    profile: Annotated[
        Path, typer.Argument(metavar="PROFILE", help="The file of `cacheplan profile`.")
    ] = PROFILE,
    *,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", "-r", metavar="NAME", help="May be repeated; planned."),
    ] = None,
    budgets: Budgets = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Also draw the curves.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what every budget would cost, from one profile and without the model.

    The damage is predicted; `cacheplan verify` measures that of a plan.

    \b
    Examples:
      cacheplan frontier
      cacheplan frontier --recipe planned --recipe snapkv --png frontier.png
      cacheplan frontier pictures.safetensors --budgets 0.3,0.4,0.5
    """
    if png is not None:
        check_curves(png)
    with progress("solving", "plans", "reading the profile") as report:
        found = api.load_profile(profile)
        points, missing = solve_frontier(
            found,
            recipes=recipe or ["planned"],
            budgets=shares(budgets) if budgets else BUDGETS,
            progress=report,
        )
    if png is not None:
        _plot(points, found, png)
        say(f"{png} shows the curves.")
    if as_json:
        emit({"file": str(profile), "points": [asdict(p) for p in points], "left_out": missing})
    else:
        unit = "KL per token" if isinstance(found, KVProfile) else "error of the final latent"
        table = table_of("recipe", "budget", "reached", f"predicted {unit}", "no plan below")
        for p in points:
            cells = percent(p.budget), percent(p.reached), number(p.damage), number(p.bound)
            table.add_row(p.recipe, *cells)
        draw(table)
        for sentence in missing:
            say(sentence)
    suggest(f"cacheplan solve {profile} --budget {points[len(points) // 2].budget:g}")


def _plot(points: list[Point], profile: Profile, path: Path) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    bounds: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if point.damage is not None:
            curves.setdefault(point.recipe, []).append((point.reached, point.damage))
        if point.bound:
            bounds.setdefault(point.recipe, []).append((point.reached, point.bound))
    language = isinstance(profile, KVProfile)
    plot_curves(
        path,
        curves,
        bounds=bounds,
        share="share of the cache kept" if language else "share of the FLOPs computed",
        damage="predicted KL per token, nats" if language else "predicted error of the latent",
        title=model_words(profile.model),
    )
