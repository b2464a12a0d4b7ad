"""Blocks x steps in the terminal: what is computed, and what stands in for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from cacheplan.cli.heatmap import cell
from cacheplan.cli.kv_facts import statistic
from cacheplan.cli.numbers import number
from cacheplan.plans.rules import RANGES
from cacheplan.types import FeatureEntry, FeaturePlan, FeatureProfile

COMPUTED = "█"
MARGIN = "block "
SENSITIVE = 10  # cells of a row of sensitivities
_COLOURS = {"r": "yellow", "f": "cyan", "s": "red", "R": "yellow", "F": "cyan"}
_WORDS = {
    COMPUTED: "computed",
    "r": "the block's delta is reused",
    "f": "the block's delta is forecast",
    "s": "the block is left out",
    "R": "the last hidden state, branch or model output is reused, the whole column with it",
    "F": "the last hidden state, branch or model output is forecast, the whole column with it",
}
_WHOLE = ("hidden", "model", "branch")


@dataclass(frozen=True)
class FeatureMap:
    """`cells` holds a line per block with a character per step; alike blocks share a line."""

    cells: tuple[str, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        steps = len(self.cells[0])
        room = options.max_width - len(MARGIN)
        wide = 2 if 2 * steps <= room else 1
        fitting = max(1, room // wide)
        for first in range(0, steps, fitting):
            shown = range(first, min(first + fitting, steps))
            head = "".join(f"{step:<{5 * wide}}" for step in shown if step % 5 == 0)
            lead = " " * (wide * (-shown.start % 5))
            yield Text(MARGIN + lead + head.rstrip(), style="dim", no_wrap=True)
            for name, line in rows(self.cells):
                text = Text(no_wrap=True).append(f"{name:>5} ", style="dim")
                for step in shown:
                    text.append(line[step] * wide, style=_COLOURS.get(line[step], ""))
                yield text


def rows(cells: Sequence[str]) -> list[tuple[str, str]]:
    """Name and cells of each line; neighbours that are alike become one ("0-7")."""
    found: list[tuple[int, int, str]] = []
    for index, line in enumerate(cells):
        if found and found[-1][2] == line:
            found[-1] = (found[-1][0], index, line)
        else:
            found.append((index, index, line))
    return [(str(a) if a == b else f"{a}-{b}", line) for a, b, line in found]


def feature_map(plan: FeaturePlan) -> FeatureMap:
    """A letter for every block and step; see `legend`."""
    spec = plan.model
    lines = [[COMPUTED] * spec.steps for _ in spec.blocks]
    parts: dict[tuple[int, int], list[FeatureEntry]] = {}
    for entry in plan.entries:
        site, letter = entry.site, entry.action.do[0]
        if site.part in _WHOLE:
            letter = letter.upper()
        elif site.part not in RANGES:
            parts.setdefault((site.first, entry.step), []).append(entry)
            continue
        for block in range(site.first, site.last):
            lines[block][entry.step] = letter
    for (block, step), entries in parts.items():
        kept, all_of = len(entries), len(spec.blocks[block].parts)
        lines[block][step] = "p" if kept == all_of else str(min(kept, 9))
    return FeatureMap(tuple("".join(line) for line in lines))


def legend(found: FeatureMap) -> list[str]:
    """A line per character in use."""
    used = sorted(set("".join(found.cells)), key=lambda letter: (letter != COMPUTED, letter))
    return [f"  {letter}  {_word(letter)}" for letter in used]


def _word(letter: str) -> str:
    if letter.isdigit():
        return f"{letter} of the block's parts not computed"
    return _WORDS.get(letter, "all parts of the block not computed, their gates and sums are")


def sensitivity_lines(profile: FeatureProfile) -> list[Text]:
    """The error of the final latent when a step alone reuses the one before, in percent of most.

    Ten steps a line, after a line that says what the numbers are.
    """
    errors = np.sqrt(statistic(profile, "final_error").mean(0))  # [T]
    most = float(errors.max())
    head = "error of the final latent when a step alone is held, percent of the largest"
    lines = [Text(f"{head} ({number(most)}):")]
    for first in range(0, len(errors), SENSITIVE):
        line = Text(no_wrap=True).append(f"{first:>5} ", style="dim")
        for error in errors[first : first + SENSITIVE]:
            line.append_text(cell(float(error / most) if most else 0.0, " "))
        lines.append(line)
    return lines
