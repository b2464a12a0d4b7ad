"""Sections of docs/results.md of results with one run for each model."""

from __future__ import annotations

from typing import Any

from markdown import feature_table, recipe_table
from tables import crossed, number, said, table

from cacheplan.recipes.bits import BIT_ROWS


def ablations_section(result: dict[str, Any]) -> str:
    """Plans that lack one part each, by `benchmarks/ablations.py`."""
    lines = [
        "## Where the gain comes from",
        "",
        "Every row is the whole planner with one thing in another's place, solved from the same "
        "profile for the same budget. A cell is the damage (KL in nats per token; relative error "
        "of the final latent), and how many times that of the plan in brackets behind its name, "
        "with a 95 % bootstrap interval over prompts. Below 1 the planner would be better off "
        "without that part.",
    ]
    for name, run in result["runs"].items():
        rows = run["rows"]
        budgets = list(dict.fromkeys(row["budget"] for row in rows))
        cell = {(row["variant"], row["budget"]): row for row in rows}
        cells = []
        for axis, variant, whole in dict.fromkeys(
            (row["axis"], row["variant"], row["whole"]) for row in rows
        ):
            shown = variant if variant == whole else f"{variant} ({whole})"
            texts = [_times(cell.get((variant, budget))) for budget in budgets]
            cells.append([axis or "**whole**", shown, *texts])
        heads = ["part", "in its place", *(f"at {budget:g}" for budget in budgets)]
        lines += ["", f"### {name}, {run['prompts']} prompts", "", said(run), ""]
        lines += table(heads, cells)
    return "\n".join(lines)


def _times(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    damage = number(row["kl"] if "kl" in row else row["error"])
    if row["variant"] == row["whole"]:
        return damage
    low, high = row["times_interval"]
    return f"{damage}, {row['times']:.3g} [{low:.3g}, {high:.3g}]"


def transfer_section(result: dict[str, Any]) -> str:
    """Plans used on other prompts than they were measured on, by `benchmarks/transfer.py`."""
    lines = [
        "## Calibrated on one kind of prompts, used on another",
        "",
        "Cells are KL in nats per token and the share of right answers, or the relative error of "
        "the final latent and PSNR. Kinds of texts (`benchmarks/recall_families.py`): questions "
        "`after` the context; a question `inside` it, up to its last word; `copies` of its last 48 "
        "words; mostly `filler`; contexts of 1000 words (`longer`). The mixture has as many "
        "prompts as each kind, taking turns. Methods that are calibrated on nothing are the same "
        "in all rows.",
    ]
    for name, run in result["runs"].items():
        lines += ["", f"### {name}, {run['prompts']} prompts of each kind", "", said(run)]
        for heads, cells in crossed(run["rows"]):
            lines += ["", *table(heads, cells)]
    return "\n".join(lines)


def second_section(result: dict[str, Any]) -> str:
    """All recipes on models that nothing was tuned to, by `benchmarks/second_results.py`."""
    lines = [
        "## Second models",
        "",
        "Made by `benchmarks/second_models.py`: a Qwen3 of 4 layers that speaks made-up words, and "
        "a class-conditional DiT of patterns. Nothing of the planner was chosen by them, but for "
        "one number: the least ridge of forecasts was set by calibration prompts of both picture "
        "models. Bold: the least damage.",
    ]
    for name, run in result["runs"].items():
        about = ", ".join(f"{key} {_short(value)}" for key, value in run["model"].items())
        made = recipe_table if name.startswith("language") else feature_table
        lines += [
            "",
            f"### {name}, {run['prompts']} prompts",
            "",
            said(run),
            "",
            f"Model: {about}.",
        ]
        lines += ["", made(run), "", _second_ahead(run)]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _second_ahead(run: dict[str, Any]) -> str:
    """The rows of plans over the best other of their kind, at each budget."""
    measure = "kl" if "kl" in run["rows"][0] else "error"
    coarse = {row.name for row in BIT_ROWS}
    parts = []
    for budget in dict.fromkeys(row["budget"] for row in run["rows"]):
        here = {r["recipe"]: r[measure] for r in run["rows"] if r["budget"] == budget}
        joint = here.pop("joint", None)
        whole = {name: value for name, value in here.items() if name not in coarse}
        found = [_over("planned", whole.pop("planned"), whole)]
        if joint is not None:
            found.append(_over("joint", joint, here))
        parts.append(f"{' and '.join(found)} at {budget:g}")
    kinds = ", `joint` with rows in few bits among them" if coarse & set(here) else ""
    return f"Damage over that of the best other row{kinds}: {', '.join(parts)}."


def _over(name: str, value: float, others: dict[str, float]) -> str:
    best = min(others, key=lambda other: others[other])
    return f"`{name}` {value / others[best]:.2g} ({best})"
