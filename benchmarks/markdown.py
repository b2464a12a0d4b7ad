"""The README's tables of recipes, from the JSON of `benchmarks/recipes.py` and `features.py`.

python benchmarks/markdown.py benchmarks/results/recipes.json
python benchmarks/markdown.py benchmarks/results/features.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECIPES = ("planned", "uniform", "streaming_llm", "h2o", "snapkv", "adakv", "pyramidkv")
RECIPES += ("keydiff", "flashcache", "duoattention", "kvzip")  # in the README
FEATURES = ("planned", "fewer steps", "uniform", "taylorseer", "cachequant", "dpcache")
FEATURES += ("magcache", "ertacache", "fbcache", "teacache", "easycache")


def recipe_table(result: dict[str, Any], names: Sequence[str] | None = None) -> str:
    """KL and recall of recipes (all if not named) at every budget, best KL of each in bold."""
    return _kl_table(result, "keep {:g}", names)


def bits_table(result: dict[str, Any]) -> str:
    """KL of formats, the best choice of tokens, and both, at equal bytes; least of each in bold."""
    return _kl_table(result, "{:g} of the bytes")


def _kl_table(result: dict[str, Any], column: str, names: Sequence[str] | None = None) -> str:
    rows = [row for row in result["rows"] if row["kl"] is not None]
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    cell = {(row["recipe"], row["budget"]): row for row in rows}
    best = {b: min(row["kl"] for row in rows if row["budget"] == b) for b in budgets}
    heads = ["KL to the full cache, recall", *map(column.format, budgets)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in names or dict.fromkeys(row["recipe"] for row in rows):
        texts = []
        for budget in budgets:
            row = cell.get((name, budget))
            if row is None:
                texts.append("-")
                continue
            kl = f"{row['kl']:.2g}"
            if row["kl"] == best[budget]:
                kl = f"**{kl}**"
            texts.append(f"{kl}, {100 * row['recall']:.1f} %")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def headline(result: dict[str, Any]) -> str:
    """How far ahead the plan is, and how good predictions are, in two sentences."""
    summary = result["summary"]
    ahead = ", ".join(
        f"{_times(1 / found['ratio'])} times less KL at {budget} (next: {found['best_other']})"
        for budget, found in summary["planned_over_best_other"].items()
    )
    low, high = summary["measured_over_predicted"]
    predicted = sum(row["predicted_kl"] is not None for row in result["rows"])
    return (
        f"Against the best other row, `planned` has {ahead}. Prediction against measurement over "
        f"the {predicted} rows that have both: rank correlation {summary['rank_correlation']:.2f}, "
        f"measured over predicted between {low:.2f} and {high:.1f}"
    )


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"


def decode_table(result: dict[str, Any]) -> str:
    """Milliseconds of decode attention per layer and token, and how many times faster than full."""
    rows = result["rows"]
    contexts = sorted({row["context"] for row in rows})
    cell = {(row["cache"], row["context"]): row for row in rows}
    heads = ["ms per layer and token (times faster)", *(f"{c // 1024}k tokens" for c in contexts)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys(row["cache"] for row in rows):
        found = [cell[name, context] for context in contexts]
        cells = [f"{row['ms']:.2f} ({row['speedup']:.1f})" for row in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_table(result: dict[str, Any]) -> str:
    """Peak memory of prefills and the cache they leave, in MiB."""
    lines = ["| prefill | peak | cache after it |", "|---|---|---|"]
    for row in result["rows"]:
        lines.append(f"| {row['way']} | {row['peak_mib']:.0f} MiB | {row['cache_mib']:.0f} MiB |")
    return "\n".join(lines)


def feature_table(result: dict[str, Any], names: Sequence[str] | None = None) -> str:
    """Error and PSNR of feature recipes (all if not named), least error of each budget in bold."""
    rows = result["rows"]
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    if names is None:
        every = dict.fromkeys(row["recipe"] for row in rows)
        names = sorted(every, key=lambda name: name != "planned")
    cell = {(row["recipe"], row["budget"]): row for row in rows}
    best = {b: min(row["error"] for row in rows if row["budget"] == b) for b in budgets}
    heads = ["error of the final latent, PSNR", *(f"compute {budget:g}" for budget in budgets)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in names:
        texts = []
        for budget in budgets:
            row = cell.get((name, budget))
            if row is None:
                texts.append("infeasible")
                continue
            error = f"{row['error']:.2g}"
            if row["error"] == best[budget]:
                error = f"**{error}**"
            texts.append(f"{error}, {row['psnr']:.1f} dB")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def feature_headline(result: dict[str, Any]) -> str:
    """The plan against the best other row and fewer steps, and how good predictions are."""
    summary = result["summary"]
    ahead = ", ".join(
        f"{found['ratio']:.2f} and {found['ratio_to_fewer_steps']:.2f} at {budget} "
        f"(best other: {found['best_other']})"
        for budget, found in summary["planned_over_best_other"].items()
    )
    low, high = summary["measured_over_predicted"]
    predicted = sum("predicted_error" in row for row in result["rows"])
    return (
        "The error of `planned`, as a share of the best other recipe's and of fewer steps', is "
        f"{ahead}. Prediction against measurement over the {predicted} plans that have both: rank "
        f"correlation {summary['rank_correlation']:.2f}, measured over predicted between "
        f"{low:.2f} and {high:.1f}"
    )


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text())
    if "error" in found["rows"][0]:
        print(feature_table(found, FEATURES), feature_headline(found), sep="\n\n")
    elif "predicted_kl" in found["rows"][0] and "bytes" in found["rows"][0]:
        print(bits_table(found))
    else:
        print(recipe_table(found, RECIPES), headline(found), sep="\n\n")
