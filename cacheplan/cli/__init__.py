"""The command line: one short file per command, each of which calls `cacheplan.api`."""

from __future__ import annotations

import os

from cacheplan.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """The entry point of the `cacheplan` script."""
    # transformers' own bars would run through ours; HF_HUB_DISABLE_PROGRESS_BARS=0 shows them
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app(prog_name="cacheplan")
