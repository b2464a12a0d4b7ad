"""Where the gain comes from: plans that lack one part each, beside the whole planner.

    python benchmarks/ablations.py language [--model DIR] [--profile FILE] [--json FILE]
    python benchmarks/ablations.py diffusion [--model DIR] [--profile FILE] [--json FILE]

Without --profile the model is profiled first.  Prompts are fresh ones of the model's language, of
both kinds that it is calibrated on, or its held-out ones where it draws pictures.  A model folder
of `second_models.py` brings its own prompts along.  The JSON keeps one run for each family and
model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cacheplan import api
from cacheplan.environment import environment
from cacheplan.errors import InfeasibleError
from cacheplan.types import FeatureProfile, KVProfile
from cacheplan.zoo import EMBEDDED_DIFFUSION_MODEL, EMBEDDED_LANGUAGE_MODEL

sys.path.insert(0, str(Path(__file__).parent))  # also under PYTHONSAFEPATH
sys.path.insert(0, str(Path(__file__).parent / "peers"))

from intervals import mean_interval, ratio_interval
from recall_families import HELDOUT, language_of, write

BUDGETS = {"language": [0.5, 0.2, 0.1, 0.05], "diffusion": [0.5, 0.4, 0.3]}
KINDS = ["after", "inside"]  # of prompts, as in the calibration
MEASURED = ["joint", "prefixkv"]  # the recipes whose candidates are tried
SPLIT = 0.8


Rows = list[dict[str, Any]]


def language(options: argparse.Namespace, folder: Path) -> Iterator[Rows]:
    """Rows of one budget after the other."""
    from ablations_kv import variants

    from cacheplan.adapters.language import load
    from cacheplan.profilers.prompts import load_prompts
    from cacheplan.verification import measure_plans

    calibration = options.calibration or prompts_beside(options.model, "calibration.jsonl")
    profile = options.profile or folder / "profile.safetensors"
    if options.profile is None:
        api.profile(options.model, out=profile, prompts=calibration, recipes=MEASURED)
    found = api.load_profile(profile)
    assert isinstance(found, KVProfile)
    loaded = load(options.model)
    file = folder / "fresh.jsonl"
    write(file, KINDS, options.prompts, HELDOUT, language_of(options.model))
    prompts = load_prompts(file, loaded.tokenizer, split=SPLIT, limit=None, longest=0)
    for budget in options.budgets:
        rows = []
        here = list(variants(found, budget, options.model, calibration))
        measured = measure_plans(loaded.model, [variant.plan for variant in here], prompts)
        damage = {
            variant.name: seen.kl_per_prompt for variant, seen in zip(here, measured, strict=True)
        }
        for variant, seen in zip(here, measured, strict=True):
            row = _row(budget, variant, damage, "kl")
            row |= {
                "recall": seen.damage.recall,
                "full_recall": seen.damage.full_recall,
                "kept": seen.measured_bytes / seen.full_bytes,
            }
            rows.append(row)
        print(f"{budget:g}: {len(here)} plans measured", file=sys.stderr, flush=True)
        yield rows


def diffusion(options: argparse.Namespace, folder: Path) -> Iterator[Rows]:
    """Rows of one budget after the other."""
    from ablations_features import variants

    from cacheplan.picture_inputs import open_for_plan, picture_prompts_for
    from cacheplan.picture_verification import measure_plans

    calibration = options.calibration or prompts_beside(options.model, "calibration.jsonl")
    heldout = prompts_beside(options.model, "heldout.jsonl")
    settings = _settings(options.model)
    profile = options.profile or folder / "profile.safetensors"
    if options.profile is None:
        api.profile(
            options.model,
            family="diffusion",
            out=profile,
            prompts=calibration,
            settings=settings,
        )
    found = api.load_profile(profile)
    assert isinstance(found, FeatureProfile)
    for budget in options.budgets:
        rows = []
        try:
            here = list(variants(found, budget, options.model, calibration, settings))
        except InfeasibleError as error:
            print(f"{budget:g}: {error}", file=sys.stderr, flush=True)
            continue
        opened = open_for_plan(
            here[0].plan, model=options.model, settings=settings, device=None, dtype=None
        )
        prompts = picture_prompts_for(opened, heldout, "heldout", options.prompts)
        plans = [variant.plan for variant in here]
        measured, _ = measure_plans(opened.pipe, plans, opened.call, prompts)
        damage = {
            variant.name: seen.error_per_prompt
            for variant, seen in zip(here, measured, strict=True)
        }
        for variant, seen in zip(here, measured, strict=True):
            row = _row(budget, variant, damage, "error")
            row |= {"psnr": seen.damage.psnr, "kept": seen.counted_flops / seen.full_flops}
            rows.append(row)
        print(f"{budget:g}: {len(here)} plans measured", file=sys.stderr, flush=True)
        yield rows


def _row(
    budget: float, variant: Any, damage: dict[str, tuple[float, ...]], name: str
) -> dict[str, Any]:
    """One plan's damage with its interval, and over that of the plan that lacks nothing."""
    own, whole = damage[variant.name], damage[variant.whole]
    return {
        "budget": budget,
        "axis": variant.axis,
        "variant": variant.name,
        "whole": variant.whole,
        name: fmean(own),
        f"{name}_interval": list(mean_interval(own)),
        "times": fmean(own) / max(fmean(whole), sys.float_info.min),
        "times_interval": list(ratio_interval(own, whole)),
    }


def prompts_beside(model: str | None, name: str) -> Path | None:
    """The prompts of a model of `second_models.py`; None for the embedded models' own."""
    return None if model is None else Path(model) / name


def _settings(model: str | None) -> dict[str, Any]:
    if model is None:
        return {}
    return dict(json.loads((Path(model) / "call.json").read_text(encoding="utf-8")))


def table(rows: Rows) -> Table:
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    shown = Table("axis", "variant", *(f"{budget:g}: damage, times" for budget in budgets))
    cell = {(row["variant"], row["budget"]): row for row in rows}
    for axis, name in dict.fromkeys((row["axis"], row["variant"]) for row in rows):
        cells = []
        for budget in budgets:
            row = cell.get((name, budget))
            damage = 0.0 if row is None else row.get("kl", row.get("error"))
            cells.append("-" if row is None else f"{damage:.2g}  x{row['times']:.3g}")
        shown.add_row(axis, name, *cells)
    return shown


FAMILIES: dict[str, Callable[[argparse.Namespace, Path], Iterator[Rows]]] = {
    "language": language,
    "diffusion": diffusion,
}
EMBEDDED = {"language": EMBEDDED_LANGUAGE_MODEL, "diffusion": EMBEDDED_DIFFUSION_MODEL}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--model", help="a folder of second_models.py; the embedded one otherwise")
    parser.add_argument("--profile", type=Path, help="measured beforehand on the calibration")
    parser.add_argument("--calibration", type=Path, help="other prompts than the model's own")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--budgets", type=float, nargs="+")
    parser.add_argument("--json", type=Path, help="also holds the runs of other models")
    options = parser.parse_args()
    options.budgets = options.budgets or BUDGETS[options.family]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name = Path(options.model).name if options.model else EMBEDDED[options.family]
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        for found in FAMILIES[options.family](options, Path(folder)):
            rows += found
            if options.json:
                run = {**environment(), "prompts": options.prompts, "rows": rows}
                store(options.json, f"{options.family}: {name}", run)
    Console(width=150).print(table(rows))


def store(path: Path, name: str, run: dict[str, Any]) -> None:
    """Put one run among the others of a file."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else {}
    path.write_text(json.dumps({"runs": {**runs, name: run}}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
