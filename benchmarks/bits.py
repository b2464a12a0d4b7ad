"""Few bits, few tokens, or both: recipes at equal bytes on held-out prompts.

    python benchmarks/bits.py [--profile FILE] [--json FILE] [--limit N]

Without --profile, the embedded model is profiled first.  Damage is measured by
`cacheplan.verify`; each planned byte count is asserted to equal the measured one.  The plain
formats drop tokens by SnapKV's scores below the share that all tokens take.  Published methods have
fixed formats, and no row at budgets below those.  Bytes of few bits hold at the profile's mean
length and on average near it; where the held-out prompts' lengths would take more, the plan is
solved for a little less.  Bytes are those of a 16-bit model, as in budgets (the embedded one
computes in 32).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cacheplan import api
from cacheplan.adapters.language import load
from cacheplan.environment import environment
from cacheplan.errors import InfeasibleError
from cacheplan.plans.rows import cache_bytes, full_bytes
from cacheplan.profilers.prompts import load_prompts
from cacheplan.types import KVPlan, KVProfile
from cacheplan.verification import measure_plans
from cacheplan.zoo import embedded_prompts

BUDGETS = (0.5, 0.3, 0.2, 0.1, 0.05)
FIXED = ("kivi", "zipcache", "mikv", "kvtuner")
FORMATS = ("int8", "fp8", "int4", "int2")
TOKENS = ("snapkv", "adakv", "keydiff", "planned")  # all bits, of fewer tokens
RECIPES = (*FIXED, *FORMATS, *TOKENS, "joint")
_LESS = 0.98  # steps in which budgets shrink until the bytes fit


def measure(profile_file: Path | None, limit: int | None) -> list[dict[str, Any]]:
    if profile_file is None:
        with tempfile.TemporaryDirectory() as folder:
            profile = api.profile(out=Path(folder) / "profile.safetensors")
    else:
        profile = api.load_profile(profile_file)
    assert isinstance(profile, KVProfile)
    loaded = load(None)
    prompts = load_prompts(
        embedded_prompts("recall", "heldout"), loaded.tokenizer, split=0.8, limit=limit, longest=0
    )
    lengths = [len(prompt.context) for prompt in prompts]
    rows = []
    for budget in BUDGETS:
        plans = {}
        for name in RECIPES:
            try:
                plans[name] = _within(profile, name, budget, lengths)
            except InfeasibleError as error:
                print(f"{budget:<4} {name:9} left out: {error}", flush=True)
        measured = measure_plans(loaded.model, list(plans.values()), prompts)
        for (name, plan), found in zip(plans.items(), measured, strict=True):
            assert found.planned_bytes == found.measured_bytes, (name, budget)
            share = _share(plan, lengths)
            rows.append(
                {
                    "budget": budget,
                    "recipe": name,
                    "bytes": share,
                    "kl": found.damage.kl,
                    "predicted_kl": plan.predicted.kl if plan.predicted else None,
                    "agreement": found.damage.agreement,
                    "recall": found.damage.recall,
                    "full_recall": found.damage.full_recall,
                    "nll": found.damage.nll,
                    "gap": plan.certificate.gap,
                }
            )
            print(_line(rows[-1]), flush=True)
    return rows


def _within(profile: KVProfile, name: str, budget: float, lengths: list[int]) -> KVPlan:
    """A plan that takes at most `budget` of the bytes of these lengths together."""
    asked = budget
    while _share(plan := api.solve(profile, budget=asked, recipe=name), lengths) > budget:
        asked *= _LESS
    return plan


def _share(plan: KVPlan, lengths: list[int]) -> float:
    """Bytes after contexts of these lengths, of those that full 16-bit caches take."""
    stored = sum(cache_bytes(plan, length, 2) for length in lengths)
    return stored / sum(full_bytes(plan.model, length, 2) for length in lengths)


def _line(row: dict[str, Any]) -> str:
    predicted = row["predicted_kl"]
    return (
        f"{row['budget']:<4} {row['recipe']:9} bytes {row['bytes']:.3f} KL {row['kl']:.2g} "
        f"predicted {'-' if predicted is None else f'{predicted:.2g}'} recall {row['recall']:.3f}"
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far `joint` is ahead at each budget, of all others and of dropping tokens alone."""
    ahead = {}
    for budget in BUDGETS:
        here = {row["recipe"]: row for row in rows if row["budget"] == budget}
        joint = here.pop("joint")
        best = min(here.values(), key=lambda row: row["kl"])
        tokens = min((here[name] for name in TOKENS), key=lambda row: row["kl"])
        ahead[str(budget)] = {
            "best_other": best["recipe"],
            "ratio": joint["kl"] / best["kl"],
            "best_of_tokens": tokens["recipe"],
            "ratio_to_tokens": joint["kl"] / tokens["kl"],
            "measured_over_predicted": joint["kl"] / joint["predicted_kl"],
        }
    return ahead


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("recipe", *(f"{b:g}: KL, recall" for b in BUDGETS))
    for name in RECIPES:
        cells = []
        for budget in BUDGETS:
            found = [r for r in rows if r["recipe"] == name and r["budget"] == budget]
            cells += [f"{r['kl']:.2g}  {r['recall']:.0%}" for r in found] or ["-"]
        shown.add_row(name, *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--json", type=Path)
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


if __name__ == "__main__":
    main()
