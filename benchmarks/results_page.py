"""docs/results.md, from the stored JSON of benchmarks: one function for each section.

python benchmarks/results_page.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "peers"))

from kv_report import damage_lines, fixed_sizes  # noqa: E402
from markdown import feature_headline, feature_table, headline, recipe_table  # noqa: E402
from result_runs import ablations_section, second_section, transfer_section  # noqa: E402
from tables import said, table  # noqa: E402

PAGE = ROOT.parent / "docs" / "results.md"
HEAD = """# Results

This page is written by `python benchmarks/results_page.py` from `benchmarks/results/*.json`, where
versions, commands and all numbers are.
"""


def diffusion_section(result: dict[str, Any]) -> str:
    """Peers and plans on the embedded diffusion pipeline, by `benchmarks/peers/diffusion.py`."""
    rows, prompts = result["rows"], result["prompts"]
    versions = result["versions"]
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    cells = {(row["method"], row["budget"]): row for row in rows}
    best: dict[float, list[str]] = {}
    for budget in budgets:
        found = result["summary"][f"{budget:g}"]
        best[budget] = [found["best"], found["peer"]]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        texts = []
        for budget in budgets:
            row = cells.get((method, budget))
            text = _error(row) if row else "-"
            texts.append(f"**{text}**" if method in best[budget] else text)
        lines.append([method, *texts])
    at_half = {row["method"]: row for row in rows if row["budget"] == 0.5 and "error" in row}
    costs = [
        [
            cost["method"],
            f"{cost['compute']:.2f}",
            f"{cost['time']:.2f}",
            f"{cost['bytes'] / 2**20:.1f}",
            *(_quality(at_half.get(cost["method"]))),
        ]
        for cost in result["costs"]
    ]
    left_out = [f"- {name}: {reason}" for name, reason in result["left_out"].items()]
    heads = ["error of the final latent, PSNR", *(f"compute {b:g}" for b in budgets)]
    cost_heads = ["one picture", "compute", "CPU time", "peak MiB", "SSIM", "distance"]
    return "\n".join(
        [
            "## Diffusion: peers at equal compute",
            "",
            said(result),
            "",
            f"One pipeline (the embedded `shapes`, 30 steps, guidance 3.5), {prompts['heldout']} "
            "held-out prompts, the same noise for all. Compute is FLOPs as torch counts them, over "
            "those of the full run. Every knob of a peer "
            f"(diffusers {versions['diffusers']}, cache-dit {versions['cache-dit']}) was swept on "
            f"{prompts['tuning']} calibration prompts; the settings around each budget were "
            "measured on held-out prompts and are interpolated log-linearly to the budget. Methods "
            "that decide online were given one prompt at a time. Rows of cacheplan are plans at "
            "their own compute, at most the budget. In brackets: 95 % bootstrap intervals over "
            "prompts. Bold: the best plan and the best peer.",
            "",
            *table(heads, lines),
            "",
            _ahead(result["summary"]),
            "",
            "What a picture costs with the setting nearest to compute 0.5 (one thread; time over "
            "that of the full run; peak of the memory that torch allocates), SSIM, and the "
            "distance of all pictures from drawings of the same prompts, less that of the full "
            "run's (KID's unbiased estimator on features of a fixed random network, described in "
            "`benchmarks/peers/picture_metrics.py`):",
            "",
            *table(cost_heads, costs),
            "",
            "Not measured:",
            "",
            *left_out,
        ]
    )


def _error(row: dict[str, Any]) -> str:
    if "error" not in row:
        return "not reached"
    number = f"{row['error']:.2g} [{row['low']:.2g}, {row['high']:.2g}]"
    return f"{number}, {row['psnr']:.1f} dB"


def _quality(row: dict[str, Any] | None) -> list[str]:
    return [f"{row['ssim']:.4f}", f"{row['distance']:.3f}"] if row else ["-", "-"]


def _ahead(summary: dict[str, Any]) -> str:
    parts = [
        f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}] at {budget} "
        f"({found['best']} against {found['peer']})"
        for budget, found in summary.items()
    ]
    return f"Error of the best plan over that of the best peer: {'; '.join(parts)}."


def kv_section(result: dict[str, Any]) -> str:
    """Peers and plans on the embedded language model, by `benchmarks/peers/kv.py`."""
    rows, decode = result["rows"], result["decode"]
    named = result.get("model")
    model = "the embedded `recall`" if named is None else f"`{named}`"
    other = "" if named is None else f", on {named}"
    peers = ", ".join(f"{name} {version}" for name, version in result["peers"].items())
    whole = [
        f"{arm} {kept} of the bytes, {damage}" for arm, kept, damage in fixed_sizes(rows, "after")
    ]
    full = decode["arms"]["full"]["bytes_after_a_step"]
    steps = [
        [name, f"{arm['ms']:.1f}", f"{arm['bytes_after_a_step'] / full:.2f}"]
        for name, arm in sorted(decode["arms"].items(), key=lambda item: float(item[1]["ms"]))
    ]
    absent = [
        f"- {name}: {why}" for name, why in {**result["refused"], **result["not_run"]}.items()
    ]
    left_out = f" Left out of this run: {', '.join(result['left_out'])}." * bool(result["left_out"])
    return "\n".join(
        [
            f"## KV caches: peers at equal bytes{other}",
            "",
            said(result),
            "",
            f"One model ({model}), {result['prompts']} held-out prompts of some 400 "
            f"tokens, the same for all arms ({peers} on transformers "
            f"{result['versions']['transformers']}). The context is compressed once; then the true "
            "continuation is read and every next token compared with the full cache's. KL in nats "
            "per token, and how many answers are right. Bytes are those of a 16-bit model, scales "
            "and zeros included. kvpress' methods per head mask keys that stay stored: their rows "
            'say "all" and hold the whole cache in memory. Rows "of both" are a peer\'s scores '
            "under our shares of layers or heads. Plans were solved and refined on calibration "
            "prompts only. DuoAttention's heads are scored on the calibration texts in place of "
            "BookSum, and keep 4 sinks and as many recent tokens as fit instead of 128 and 256; "
            "KVzip asks for a repetition in words that this model does not know. Bold: the least "
            f"KL.{left_out}",
            "",
            "Questions after the context, unknown when it is compressed:",
            "",
            *table(*damage_lines(rows, "after")),
            "",
            f"Caches in few bits that keep all tokens: {'; '.join(whole)}.",
            "",
            _kv_ahead(result["goals"], "after"),
            "",
            "The first question inside the context, up to its last word (one answer per prompt):",
            "",
            *table(*damage_lines(rows, "inside")),
            "",
            _kv_ahead(result["goals"], "inside"),
            "",
            f"One decode step after {decode['context']} tokens at budget {decode['budget']:g} (ms "
            "of the thread's CPU time; a model this small shows what the runtimes cost, not what "
            "memory traffic saves), and the bytes stored after the first step, over those of the "
            "full cache (plans take room for 64 more tokens per head at once):",
            "",
            *table(["arm", "ms per token", "stored"], steps),
            "",
            *_remarks(result["notes"]),
            "",
            "Not run:",
            "",
            *absent,
        ]
    )


def _remarks(notes: dict[str, str]) -> list[str]:
    """Every note once, with the arms it is about."""
    texts = dict.fromkeys(notes.values())
    return [f"- {', '.join(arm for arm in notes if notes[arm] == text)}: {text}" for text in texts]


def _kv_ahead(goals: list[dict[str, Any]], setting: str) -> str:
    parts = [
        f"{_kv_ratio(goal)} at {goal['budget']:g} by bytes {goal['bytes']} ({goal['ours']} against "
        f"{goal['peer']})"
        for goal in goals
        if goal["setting"] == setting
    ]
    return (
        "KL of our best row over that of the best peer whose bytes fit the budget, with 95 % "
        f"bootstrap intervals over prompts: {'; '.join(parts)}."
    )


def _kv_ratio(goal: dict[str, Any]) -> str:
    if goal["negligible"]:
        return "both below 1e-4 nats"
    low, high = goal["interval"]
    return f"{goal['ratio']:.2g} [{low:.2g}, {high:.2g}]"


def recipes_section(result: dict[str, Any]) -> str:
    """Every recipe on the embedded language model, by `benchmarks/recipes.py`."""
    return "\n".join(
        [
            "## KV caches: every recipe from one profile",
            "",
            said(result),
            "",
            "The embedded `recall`, held-out prompts: half of them ask after the context has been "
            "compressed, half end in a question. KL to the full cache in nats per token, and the "
            "share of answers that are right; best KL of each budget in bold.",
            "",
            recipe_table(result),
            "",
            f"{headline(result)}.",
        ]
    )


def features_section(result: dict[str, Any]) -> str:
    """Every recipe on the embedded diffusion model, by `benchmarks/features.py`."""
    return "\n".join(
        [
            "## Diffusion: every recipe from one profile",
            "",
            said(result),
            "",
            "The embedded `shapes`, 32 held-out prompts, every arm from the same noise. Error of "
            "the final latent, relative to its length, and PSNR; gates decide while they run and "
            "hold a budget only on average.",
            "",
            feature_table(result),
            "",
            f"{feature_headline(result)}.",
        ]
    )


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "recipes.json": recipes_section,
    "features.json": features_section,
    "peers_kv.json": kv_section,
    "peers_kv_second.json": kv_section,
    "peers_diffusion.json": diffusion_section,
    "ablations.json": ablations_section,
    "transfer.json": transfer_section,
    "second_models.json": second_section,
}


def main() -> None:
    found = [HEAD]
    for name, section in SECTIONS.items():
        path = ROOT / "results" / name
        if path.exists():
            found.append(section(json.loads(path.read_text(encoding="utf-8"))) + "\n")
    PAGE.write_text("\n".join(found), encoding="utf-8")


if __name__ == "__main__":
    main()
