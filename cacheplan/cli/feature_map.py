"""Blocks x steps in the terminal: what is computed, and what stands in for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from cacheplan.cli.heatmap import cell, colour
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
    styles: Mapping[str, str | Style] = field(default_factory=lambda: _COLOURS)

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
                    text.append(line[step] * wide, style=self.styles.get(line[step], ""))
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


def change_maps(profile: FeatureProfile) -> Iterator[tuple[str, FeatureMap]]:
    """What is held, in words, and how far that moves the output: digits, 9 for the most.

    Root mean squares, for whole blocks and for each kind of part; nothing in profiles that did not
    follow gradients.
    """
    if "held_change" not in profile.statistics:
        return
    change = np.sqrt(np.maximum(statistic(profile, "held_change"), 0))  # [sites, T]
    kinds: dict[str, list[int]] = {}
    for index, site in enumerate(profile.sites):
        if site.last == site.first + 1 and site.part not in _WHOLE:
            kinds.setdefault(site.part, []).append(index)
    most = max(float(change[indices].max()) for indices in kinds.values())
    shades = {str(digit): _shade(digit / 9) for digit in range(10)}
    for part in sorted(kinds, key=lambda part: (part != "delta", part)):
        lines = [[" "] * profile.model.steps for _ in profile.model.blocks]
        for index in kinds[part]:
            digits = np.rint(9 * change[index] / most).astype(int) if most else [0] * len(change[0])
            lines[profile.sites[index].first] = [str(digit) for digit in digits]
        words = "a block" if part == "delta" else f"{part.replace('_', ' ')} of a block"
        yield f"{words} ({number(most)} is 9)", FeatureMap(tuple(map("".join, lines)), shades)


def _shade(share: float) -> Style:
    ink = "white" if share < 0.5 else "black"
    return Style(color=ink, bgcolor=Color.from_rgb(*colour(share)))
