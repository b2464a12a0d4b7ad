"""Progress on stderr: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cacheplan.cli.output import say

EVERY = 5.0  # seconds between plain lines


@contextmanager
def progress(
    title: str, unit: str = "prompts", begin: str = "loading the model"
) -> Iterator[Callable[[int, int, str], None]]:
    """Yield the function that takes (units done, units in all, what is being done).

    `begin` is what happens until it is first called.
    """
    pace, begin = Pace(unit), f"{title}: {begin}"
    with (_bar if sys.stderr.isatty() else _lines)(title, pace, begin) as report:
        yield report


@contextmanager
def _bar(title: str, pace: Pace, begin: str) -> Iterator[Callable[[int, int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[pace]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(begin, total=None, pace="")

        def report(done: int, total: int, what: str) -> None:
            text = pace.text(done, total)
            bar.update(task, completed=done, total=total, pace=text, description=f"{title}: {what}")

        yield report


@contextmanager
def _lines(title: str, pace: Pace, begin: str) -> Iterator[Callable[[int, int, str], None]]:
    last = -EVERY
    say(begin)

    def report(done: int, total: int, what: str) -> None:
        nonlocal last
        text = pace.text(done, total)
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            say(f"{title}: {what}, {text}")

    yield report


class Pace:
    """Rate and remaining time since the first report, which may follow an interrupted run."""

    def __init__(self, unit: str = "prompts") -> None:
        self.unit = unit
        self.start: tuple[float, int] | None = None

    def text(self, done: int, total: int) -> str:
        now = time.monotonic()
        began, first = self.start = self.start or (now, done)
        text = f"{done}/{total} {self.unit}"
        if done > first and now > began:
            rate = (done - first) / (now - began)
            minutes, seconds = divmod(round((total - done) / rate), 60)
            text += f", {rate:.2g}/s, {minutes}:{seconds:02} left"
        return text
