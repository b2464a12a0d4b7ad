"""The Typer application: which commands there are, and the options before them."""

from __future__ import annotations

from typing import Annotated

import typer

from cacheplan import __version__
from cacheplan.cli.compare import compare
from cacheplan.cli.demo import demo
from cacheplan.cli.diff import diff
from cacheplan.cli.edge import Edge
from cacheplan.cli.frontier import frontier
from cacheplan.cli.merge import merge
from cacheplan.cli.profile import profile
from cacheplan.cli.recipes import recipes
from cacheplan.cli.refine import refine
from cacheplan.cli.run import run
from cacheplan.cli.show import show
from cacheplan.cli.solve import solve
from cacheplan.cli.verify import verify

app = typer.Typer(
    cls=Edge,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help and usage errors, and a start without loading Rich
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"cacheplan {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; may also follow the command.")
    ] = False,
) -> None:
    """Profile a model's caches, solve for the best plan under a budget, run it.

    Caches are the KV cache of a language model and the features of a diffusion model.  Without
    arguments every command uses a small embedded model and the files of the step before, so this
    works in an empty directory (with `profile --family diffusion` for pictures):

    \b
      cacheplan profile
      cacheplan solve --budget 0.2
      cacheplan run --plan plan.json

    Results go to stdout, progress and hints to stderr; --json prints one JSON object.
    """


COMMANDS = (
    profile, merge, frontier, solve, refine, run, verify, compare, show, diff, recipes, demo,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
