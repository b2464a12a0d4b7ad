"""Every recipe at several budgets on held-out prompts: damage, recall, bytes, prediction.

    python benchmarks/recipes.py [--profile FILE] [--json FILE] [--plot FILE.png] [--limit N]

Without --profile, the embedded model is profiled first.  Damage is measured by
`cacheplan.verify`; each planned byte count is asserted to equal the measured one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from cacheplan import api
from cacheplan.adapters.language import load
from cacheplan.environment import environment
from cacheplan.formulate_bits import chooses_bits
from cacheplan.profilers.prompts import load_prompts
from cacheplan.recipes import RECIPES as ROWS
from cacheplan.verification import measure_plans
from cacheplan.zoo import embedded_prompts

RECIPES = [name for name, row in ROWS.items() if not chooses_bits(row)]  # see bits.py
NAMED = ("planned", "duoattention", "cake_static", "kvzip", "flashcache", "keydiff", "adakv")
NAMED += ("pyramidkv", "snapkv", "h2o", "streaming_llm")  # by name in the picture
BUDGETS = (0.5, 0.3, 0.2, 0.1, 0.05)


def measure(profile_file: Path | None, limit: int | None) -> list[dict[str, Any]]:
    if profile_file is None:
        with tempfile.TemporaryDirectory() as folder:
            profile = api.profile(out=Path(folder) / "profile.safetensors", recipes=["all"])
            assert profile is not None
    else:
        profile = api.load_profile(profile_file)
    loaded = load(None)
    prompts = load_prompts(
        embedded_prompts("recall", "heldout"), loaded.tokenizer, split=0.8, limit=limit, longest=0
    )
    rows = []
    for budget in BUDGETS:
        plans = [api.solve(profile, budget=budget, recipe=name) for name in RECIPES]
        measured = measure_plans(loaded.model, plans, prompts)
        for name, plan, found in zip(RECIPES, plans, measured, strict=True):
            assert found.planned_bytes == found.measured_bytes, (name, budget)
            assert found.measured_bytes <= budget * found.full_bytes, (name, budget)
            rows.append(
                {
                    "budget": budget,
                    "recipe": name,
                    "kl": found.damage.kl,
                    "predicted_kl": plan.predicted.kl if plan.predicted else None,
                    "agreement": found.damage.agreement,
                    "recall": found.damage.recall,
                    "full_recall": found.damage.full_recall,
                    "nll": found.damage.nll,
                    "planned_bytes": found.planned_bytes,
                    "measured_bytes": found.measured_bytes,
                    "full_bytes": found.full_bytes,
                    "gap": plan.certificate.gap,
                }
            )
            last = rows[-1]
            print(
                f"{budget:<4} {name:18} KL {last['kl']:.4f} "
                f"predicted {_number(last['predicted_kl'])} recall {last['recall']:.3f}",
                flush=True,
            )
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far `planned` is ahead at each budget, and how good predictions are."""
    ahead = {}
    for budget in BUDGETS:
        here = [row for row in rows if row["budget"] == budget]
        best = min((row for row in here if row["recipe"] != "planned"), key=lambda row: row["kl"])
        planned = next(row for row in here if row["recipe"] == "planned")
        ahead[str(budget)] = {"best_other": best["recipe"], "ratio": planned["kl"] / best["kl"]}
    pairs = [(row["kl"], row["predicted_kl"]) for row in rows if row["predicted_kl"] is not None]
    ratios = [measured / predicted for measured, predicted in pairs]
    rank = spearmanr(*zip(*pairs, strict=True))
    return {
        "planned_over_best_other": ahead,
        "rank_correlation": float(rank.statistic),
        "measured_over_predicted": [min(ratios), max(ratios)],
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("recipe", *(f"{b:g}: KL (pred.), recall" for b in BUDGETS))
    for name in RECIPES:
        cells = []
        for budget in BUDGETS:
            row = next(r for r in rows if r["recipe"] == name and r["budget"] == budget)
            cells.append(f"{row['kl']:.4f} ({_number(row['predicted_kl'])})  {row['recall']:.0%}")
        shown.add_row(name, *cells)
    return shown


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    for name in sorted(names, key=lambda name: name in NAMED):  # others first, below
        mine = [row for row in rows if row["recipe"] == name]
        style: dict[str, Any] = {"alpha": 0.8, "label": name, "marker": "o"}
        if name == "planned":
            style |= {"linewidth": 3, "color": "black", "zorder": 3}
        elif name not in NAMED:
            style |= {"color": "lightgrey", "label": "_", "marker": ""}
        budgets = [row["budget"] for row in mine]
        axes[0].plot(budgets, [row["kl"] for row in mine], **style)
        axes[1].plot(budgets, [row["recall"] for row in mine], **style)
    others = len(set(names) - set(NAMED))
    axes[1].plot([], [], color="lightgrey", label=f"{others} others")
    axes[1].axhline(rows[0]["full_recall"], linestyle=":", color="grey", label="full cache")
    axes[0].set(xlabel="cache kept", ylabel="KL to the full cache (nats/token)", yscale="log")
    axes[1].set(xlabel="cache kept", ylabel="recall of facts (exact match)", ylim=(0, 1.03))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.suptitle("Embedded model, held-out prompts: damage (lower is better) and recall")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    rows = measure(arguments.profile, arguments.limit)
    found = summary(rows)
    Console().print(table(rows))
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(
            json.dumps({**environment(), "summary": found, "rows": rows}, indent=1) + "\n"
        )
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
