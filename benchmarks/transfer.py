"""Plans calibrated on one kind of prompts and used on another.

    python benchmarks/transfer.py language [--model DIR] [--json FILE]
    python benchmarks/transfer.py diffusion [--json FILE]

Kinds of texts are those of `recall_families.py`; a mixture of all is one more to calibrate on.
Rows that need no calibration stand beside.  Pictures differ in how many shapes they show.  The JSON
keeps one run for each family and model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cacheplan import api
from cacheplan.environment import environment
from cacheplan.types import FeaturePlan, FeatureProfile, KVPlan, KVProfile

sys.path.insert(0, str(Path(__file__).parent))  # also under PYTHONSAFEPATH
sys.path.insert(0, str(Path(__file__).parent / "peers"))

from ablations import EMBEDDED, store
from intervals import mean_interval
from recall_families import CALIBRATION, FAMILIES, HELDOUT, language_of, write
from tables import crossed

BUDGETS = {"language": [0.2, 0.1], "diffusion": [0.4]}
CALIBRATED = 24  # prompts of each profile
METHODS, BASELINES = ("planned", "joint"), ("snapkv", "keydiff")
MIXTURE, NOTHING = "mixture", "nothing"  # what a plan may also be calibrated on
COUNTS = {"one shape": 0, "two shapes": 1}  # index into `drawing.COUNTS`
PICTURES_FROM = {"calibration": 70_000, "heldout": 80_000}  # first seeds


def language(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from cacheplan.adapters.language import load
    from cacheplan.profilers.prompts import load_prompts
    from cacheplan.verification import measure_plans

    words, loaded = language_of(options.model), load(options.model)
    kinds = {name: [name] for name in FAMILIES}
    plans: list[tuple[str, str, float, KVPlan]] = []
    for calibrated, those in {**kinds, MIXTURE: list(FAMILIES)}.items():
        file = write(folder / f"{calibrated}.jsonl", those, CALIBRATED, CALIBRATION, words)
        out = folder / f"{calibrated}.safetensors"
        profile = api.profile(options.model, out=out, prompts=file, recipes=["joint", *BASELINES])
        assert isinstance(profile, KVProfile)
        print(f"profiled on {calibrated}", file=sys.stderr, flush=True)
        for budget in options.budgets:
            for method in METHODS:
                plan = api.solve(profile, budget=budget, recipe=method)
                plans.append((calibrated, method, budget, plan))
            if calibrated == MIXTURE:  # only the sites of the model are taken from it
                for method in BASELINES:
                    plan = api.solve(profile, budget=budget, recipe=method)
                    plans.append((NOTHING, method, budget, plan))
    rows = []
    for evaluated, those in kinds.items():
        file = write(folder / "heldout.jsonl", those, options.prompts, HELDOUT, words)
        prompts = load_prompts(file, loaded.tokenizer, split=0.8, limit=None, longest=0)
        measured = measure_plans(loaded.model, [plan for *_, plan in plans], prompts)
        for (calibrated, method, budget, _), seen in zip(plans, measured, strict=True):
            rows.append(
                {
                    "calibrated": calibrated,
                    "evaluated": evaluated,
                    "method": method,
                    "budget": budget,
                    "kl": fmean(seen.kl_per_prompt),
                    "kl_interval": list(mean_interval(seen.kl_per_prompt)),
                    "recall": seen.damage.recall,
                    "full_recall": seen.damage.full_recall,
                }
            )
        print(f"measured on {evaluated}", file=sys.stderr, flush=True)
    return rows


def diffusion(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from cacheplan.picture_inputs import open_for_plan, picture_prompts_for
    from cacheplan.picture_verification import measure_plans

    kinds = {name: [count] for name, count in COUNTS.items()}
    plans: list[tuple[str, str, float, FeaturePlan]] = []
    for calibrated, those in {**kinds, MIXTURE: list(COUNTS.values())}.items():
        file = folder / f"{calibrated.replace(' ', '_')}.jsonl"
        _write_pictures(file, those, CALIBRATED // 2, PICTURES_FROM["calibration"])
        out = file.with_suffix(".safetensors")
        profile = api.profile(family="diffusion", out=out, prompts=file)
        assert isinstance(profile, FeatureProfile)
        print(f"profiled on {calibrated}", file=sys.stderr, flush=True)
        for budget in options.budgets:
            plan = api.solve(profile, budget=budget)
            plans.append((calibrated, "planned", budget, plan))
            if calibrated == MIXTURE:
                plan = api.solve(profile, budget=budget, recipe="taylorseer")
                plans.append((NOTHING, "taylorseer", budget, plan))
    rows = []
    opened = open_for_plan(plans[0][3], model=None, settings={}, device=None, dtype=None)
    for evaluated, those in kinds.items():
        file = folder / "heldout.jsonl"
        _write_pictures(file, those, options.prompts, PICTURES_FROM["heldout"])
        prompts = picture_prompts_for(opened, file, "heldout", None)
        measured, _ = measure_plans(opened.pipe, [p for *_, p in plans], opened.call, prompts)
        for (calibrated, method, budget, _plan), seen in zip(plans, measured, strict=True):
            rows.append(
                {
                    "calibrated": calibrated,
                    "evaluated": evaluated,
                    "method": method,
                    "budget": budget,
                    "error": seen.damage.error,
                    "error_interval": list(mean_interval(seen.error_per_prompt)),
                    "psnr": seen.damage.psnr,
                }
            )
    return rows


def _write_pictures(path: Path, counts: list[int], number: int, first: int) -> None:
    """Write prompts whose number of shapes takes turns among `counts`."""
    from cacheplan.zoo.shapes.drawing import random_scene

    scene = random_scene(number, torch.Generator().manual_seed(first))
    scene.count[:] = torch.tensor([counts[i % len(counts)] for i in range(number)])
    lines = [json.dumps({"prompt": p, "seed": first + i}) for i, p in enumerate(scene.prompts())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", choices=EMBEDDED)
    parser.add_argument("--model", help="a language model of second_models.py")
    parser.add_argument("--prompts", type=int, default=16, help="of each kind, held out")
    parser.add_argument("--budgets", type=float, nargs="+")
    parser.add_argument("--json", type=Path, help="also holds the runs of other models")
    options = parser.parse_args()
    if options.model and options.family == "diffusion":
        parser.error("pictures of one and of two shapes are the embedded model's: no --model.")
    options.budgets = options.budgets or BUDGETS[options.family]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = language if options.family == "language" else diffusion
    with tempfile.TemporaryDirectory() as folder:
        rows = made(options, Path(folder))
    console = Console(width=150)
    for heads, lines in crossed(rows):
        shown = Table(*heads)
        for line in lines:
            shown.add_row(*line)
        console.print(shown)
    if options.json:
        name = Path(options.model).name if options.model else EMBEDDED[options.family]
        run = {**environment(), "prompts": options.prompts, "rows": rows}
        store(options.json, f"{options.family}: {name}", run)


if __name__ == "__main__":
    main()
