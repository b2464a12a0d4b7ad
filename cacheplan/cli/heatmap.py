"""Layers x heads in the terminal: a number in every cell, its size as the background colour."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from cacheplan.cli.kv_facts import scorer_words, statistic
from cacheplan.types import KVAction, KVPlan, KVProfile, Scorer

CELL = 5  # columns: three digits, a letter, a space
MARGIN = "layer "
# the others: their initial
LETTERS = {"key_norm": "n", "key_difference": "d", "low_pass_residual": "f"}
LETTER_KEEP = 0.2  # where a profile's scorers are compared
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True, eq=False)
class Heatmap:
    """`shares` `[L, K]` (0 to 1, NaN where nothing is planned) in percent.

    `letters` holds K letters per layer, shown behind the numbers.  Heads that do not fit the
    terminal go to a second map below the first.
    """

    shares: NDArray[np.float64]
    letters: Sequence[Sequence[str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        layers, heads = self.shares.shape
        fitting = max(1, (options.max_width - len(MARGIN)) // CELL)
        for first in range(0, heads, fitting):
            shown = range(first, min(first + fitting, heads))
            yield Text(MARGIN + "".join(f"{head:>3}  " for head in shown), style="dim")
            for layer in range(layers):
                line = Text().append(f"{layer:>5} ", style="dim")
                for head in shown:
                    line.append_text(
                        cell(float(self.shares[layer, head]), self.letters[layer][head])
                    )
                yield line


def _letter(scorer: Scorer) -> str:
    return LETTERS.get(scorer.name, scorer.name[0])


def cell(share: float, letter: str) -> Text:
    if np.isnan(share):
        return Text("  .  ", style="dim")
    rgb = colour(share)
    dark = 0.3 * rgb[0] + 0.6 * rgb[1] + 0.1 * rgb[2] < 128  # perceived brightness
    ink = (255, 255, 255) if dark else (0, 0, 0)
    number = " <1" if 0 < share < 0.005 else f"{100 * share:>3.0f}"  # kept, but rounds to nothing
    style = Style(color=Color.from_rgb(*ink), bgcolor=Color.from_rgb(*rgb))
    return Text(f"{number}{letter} ", style=style)


def colour(share: float) -> tuple[int, int, int]:
    at = np.clip(share, 0, 1) * (len(_VIRIDIS) - 1)
    red, green, blue = (
        round(float(np.interp(at, range(len(_VIRIDIS)), channel)))
        for channel in zip(*_VIRIDIS, strict=True)
    )
    return red, green, blue


def plan_heatmap(plan: KVPlan) -> tuple[Heatmap, list[Scorer]]:
    """Kept fraction and scorer's letter of every head, and the scorers in use."""
    layers, heads = plan.model.layers, plan.model.kv_heads
    shares = np.full((layers, heads), np.nan)
    letters = [[" "] * heads for _ in range(layers)]
    scorers: dict[Scorer, None] = {}  # ordered, without repetition
    for entry in plan.entries:
        if isinstance(entry.action, KVAction):
            site, scorer = entry.site, entry.action.scorer
            for head in range(heads) if site.head is None else [site.head]:
                shares[site.layer, head] = entry.action.keep
                letters[site.layer][head] = _letter(scorer)
            scorers[scorer] = None
    return Heatmap(shares, letters), list(scorers)


def legend(scorers: Iterable[Scorer]) -> list[str]:
    """A line per letter; settings of one scorer that differ share it."""
    variants: dict[str, list[str]] = {}
    for scorer in scorers:
        variants.setdefault(_letter(scorer), []).append(scorer_words(scorer))
    return [f"  {key}  {' or '.join(dict.fromkeys(variants[key]))}" for key in sorted(variants)]


def sensitivity_heatmap(profile: KVProfile) -> tuple[Heatmap, float, float]:
    """KL of the model when each head alone is cut back, as a share of the largest.

    The letters are those of the scorers with least damage.  Also returns the largest KL and the
    keep fraction of the letters.
    """
    divergence = statistic(profile, "ablation_kl").mean(-1)  # [L, K]
    most = float(divergence.max())
    at = int(np.argmin(np.abs(np.array(profile.keeps) - LETTER_KEEP)))
    best = statistic(profile, "damage")[..., at].argmin(-1)  # [L, K]
    names = [_letter(candidate.scorer) for candidate in profile.candidates]
    letters = [[names[a] for a in row] for row in best]
    return Heatmap(divergence / most if most else divergence, letters), most, profile.keeps[at]
