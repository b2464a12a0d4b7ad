"""`cacheplan diff`: what changed between two plans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cacheplan import api
from cacheplan.cli.options import Json
from cacheplan.cli.output import emit, suggest
from cacheplan.plans.diff import diff as changes_between


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A plan.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The plan to compare with it.")],
    as_json: Json = False,
) -> None:
    """Say what changed between two plans.

    \b
    Example:
      cacheplan diff plan.json snapkv.json
    """
    changes = changes_between(api.load_plan(a), api.load_plan(b))
    if as_json:
        emit({"a": str(a), "b": str(b), "changes": changes})
    else:
        print("\n".join(changes or ["The plans do the same."]))
    suggest(f"cacheplan show {b}")
