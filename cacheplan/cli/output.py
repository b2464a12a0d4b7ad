"""Where words go: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

PIPED_WIDTH = 120  # columns of a table that no terminal limits


def say(sentence: str) -> None:
    """Tell the user something that is not the result."""
    print(sentence, file=sys.stderr)


def suggest(command: str) -> None:
    """Name the command that usually follows."""
    say(f"Next: {command}")


def emit(result: dict[str, Any]) -> None:
    """Print the result of `--json`: one object."""
    print(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))


def draw(*renderables: Any) -> None:
    """Print tables and coloured text; in a pipe without colours and without a narrow limit."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    for renderable in renderables:
        console.print(renderable)
