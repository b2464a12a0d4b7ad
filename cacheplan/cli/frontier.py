"""`cacheplan frontier`: damage over budget, before choosing one."""

from __future__ import annotations

import io
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from cacheplan import api
from cacheplan.atomic import atomic_write
from cacheplan.cli.facts import model_words
from cacheplan.cli.numbers import number, percent
from cacheplan.cli.options import PROFILE, Json
from cacheplan.cli.output import draw, emit, say, suggest
from cacheplan.cli.progress import progress
from cacheplan.cli.tables import table_of
from cacheplan.errors import InputError, UnsupportedError
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
    budgets: Annotated[
        str | None,
        typer.Option(metavar="SHARES", help='Shares with commas between, such as "0.1,0.2,0.5".'),
    ] = None,
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
        _check_picture(png)
    with progress("solving", "plans", "reading the profile") as report:
        found = api.load_profile(profile)
        points, missing = solve_frontier(
            found,
            recipes=recipe or ["planned"],
            budgets=_shares(budgets) if budgets else BUDGETS,
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


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f'The budgets "{text}" are not numbers: write shares such as "0.1,0.2,0.5".'
        ) from None


def _check_picture(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise InputError(f'{path} has the ending "{path.suffix}", but curves are written as .png.')
    if find_spec("matplotlib") is None:
        raise UnsupportedError('Drawing curves needs matplotlib: pip install "cacheplan[plot]".')


def _plot(points: list[Point], profile: Profile, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained", dpi=150)
    axes = figure.subplots()
    for recipe in dict.fromkeys(point.recipe for point in points):
        own = [(p.reached, p.damage) for p in points if p.recipe == recipe and p.damage]
        line = axes.plot(*np.array(own).T, "o-", label=recipe)
        proven = [(p.reached, p.bound) for p in points if p.recipe == recipe and p.bound]
        if proven:
            colour = line[0].get_color()
            axes.plot(*np.array(proven).T, ":", color=colour, label="no plan below")
    language = isinstance(profile, KVProfile)
    axes.set(
        yscale="log",
        xlabel="share of the cache kept" if language else "share of the FLOPs computed",
        ylabel="predicted KL per token, nats" if language else "predicted error of the latent",
        title=model_words(profile.model),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    data = io.BytesIO()
    figure.savefig(data, format="png")
    atomic_write(path, data.getvalue())
