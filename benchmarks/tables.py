"""Pieces of pages: tables, and what a section says about where its numbers come from."""

from __future__ import annotations

from typing import Any


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows)]


def said(result: dict[str, Any]) -> str:
    """The command, the day, the machine and the versions of a result."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"    {result['command']}\n\n{result['date']}, {result['device']}; {versions}."


def number(value: float) -> str:
    """Two significant digits."""
    return f"{value:.2g}" if value >= 1e-4 or value == 0 else f"{value:.1e}"


def _grid(
    rows: list[dict[str, Any]], method: str, budget: float
) -> tuple[list[str], list[list[str]]]:
    here = [row for row in rows if row["method"] == method and row["budget"] == budget]
    kinds = list(dict.fromkeys(row["evaluated"] for row in rows))
    cell = {(row["calibrated"], row["evaluated"]): row for row in here}
    lines = []
    for calibrated in dict.fromkeys(row["calibrated"] for row in here):
        lines.append([calibrated, *(_damage(cell[calibrated, kind]) for kind in kinds)])
    return [f"{method} at {budget:g}, calibrated on", *(f"used on {kind}" for kind in kinds)], lines


def _damage(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['error']:.2g}, {row['psnr']:.1f} dB"
    recall = "" if row["recall"] is None else f", {100 * row['recall']:.0f} %"
    return f"{row['kl']:.2g}{recall}"


def crossed(rows: list[dict[str, Any]]) -> list[tuple[list[str], list[list[str]]]]:
    """One table for each budget and method: calibrated on each kind (rows), used on each kind."""
    pairs = dict.fromkeys((row["budget"], row["method"]) for row in rows)
    return [_grid(rows, method, budget) for budget, method in sorted(pairs, key=lambda p: -p[0])]
