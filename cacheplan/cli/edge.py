"""The edge between exceptions and exit codes: every error becomes one sentence on stderr."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from cacheplan.cli.output import say
from cacheplan.errors import CacheplanError

INTERRUPTED, BUG = 130, 70  # as shells count SIGINT; EX_SOFTWARE of sysexits.h

_RESUMED = {"profile": "finished prompts", "refine": "schedules that were run"}


class Edge(TyperGroup):
    """The group of all commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:  # a user adds it at the end of the command that failed
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a closed pipe must show here, where Typer ends quietly
            return result
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, BrokenPipeError):
                raise
            if hasattr(error, "exit_code") and not isinstance(error, CacheplanError):
                raise  # Typer's own: usage errors and exits
            if ctx.params["debug"]:
                traceback.print_exc()
            code, sentence = _verdict(error, ctx.invoked_subcommand)
            say(sentence)
            raise typer.Exit(code) from None


def _verdict(error: BaseException, command: str | None) -> tuple[int, str]:
    if isinstance(error, CacheplanError):
        return error.exit_code, f"Error: {error}"
    if isinstance(error, KeyboardInterrupt):
        if command in _RESUMED:
            kept = f"{_RESUMED[command]} are kept, run the same command to go on."
            return INTERRUPTED, f"Interrupted; {kept}"
        return INTERRUPTED, "Interrupted."
    reason = f"{type(error).__name__}: {error}".split("\n")[0].rstrip(".: ")
    return BUG, f"Error: a bug in cacheplan, {reason}; run with --debug for the traceback."
