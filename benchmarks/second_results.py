"""Every recipe on the second models, at equal budgets, on their held-out prompts.

    python benchmarks/second_models.py OUT
    python benchmarks/second_results.py OUT/recall_qwen3 [--json FILE]
    python benchmarks/second_results.py OUT/patterns_dit [--json FILE]

Nothing of the planner was chosen by these models but the least ridge of forecasts
(`schedules/tables.py`, `RIDGE`).  They are profiled first, on their calibration
prompts.  The JSON keeps one run for each model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from cacheplan import api
from cacheplan.environment import environment
from cacheplan.errors import CacheplanError
from cacheplan.recipes import FEATURE_RECIPES, RECIPES
from cacheplan.types import FeatureProfile, KVProfile

sys.path.insert(0, str(Path(__file__).parent))  # also under PYTHONSAFEPATH
sys.path.insert(0, str(Path(__file__).parent / "peers"))

from ablations import prompts_beside, store
from intervals import mean_interval
from markdown import feature_table, recipe_table
from second_models import recall

BUDGETS = {"language": [0.5, 0.3, 0.2, 0.1, 0.05], "diffusion": [0.7, 0.5, 0.4, 0.3]}
PROMPTS = {"language": 24, "diffusion": 12}
DECODE_EVERY = 16  # where a recipe evicts at every token, which one by one takes too long


def language(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from cacheplan.adapters.language import load
    from cacheplan.profilers.prompts import load_prompts
    from cacheplan.verification import measure_plans

    model = str(options.model)
    profile = options.profile or folder / "profile.safetensors"
    if options.profile is None:
        prompts = prompts_beside(model, "calibration.jsonl")
        api.profile(model, out=profile, prompts=prompts, recipes=["all"])
    found = api.load_profile(profile)
    assert isinstance(found, KVProfile)
    loaded = load(model)
    file = options.model / "heldout.jsonl"
    heldout = load_prompts(file, loaded.tokenizer, split=0.8, limit=PROMPTS["language"], longest=0)
    rows, left_out = [], dict[str, str]()
    for budget in BUDGETS["language"]:
        plans = {}
        for name, recipe in RECIPES.items():
            every = DECODE_EVERY if recipe.decode_every else None
            try:
                plans[name] = api.solve(found, budget=budget, recipe=name, decode_every=every)
            except CacheplanError as error:
                left_out[f"{name} at {budget:g}"] = str(error)
        measured = measure_plans(loaded.model, list(plans.values()), heldout)
        for name, seen in zip(plans, measured, strict=True):
            rows.append(
                {
                    "budget": budget,
                    "recipe": name,
                    "kl": seen.damage.kl,
                    "kl_interval": list(mean_interval(seen.kl_per_prompt)),
                    "recall": seen.damage.recall,
                    "kept": seen.measured_bytes / seen.full_bytes,
                }
            )
        print(f"{budget:g}: {len(plans)} plans measured", file=sys.stderr, flush=True)
    return {"model": recall(options.model), "rows": rows, "left_out": left_out}


def diffusion(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from cacheplan.picture_inputs import open_for_plan, picture_prompts_for
    from cacheplan.picture_verification import measure_plans

    model = str(options.model)
    settings = json.loads((options.model / "call.json").read_text(encoding="utf-8"))
    profile = options.profile or folder / "profile.safetensors"
    if options.profile is None:
        prompts = prompts_beside(model, "calibration.jsonl")
        api.profile(model, out=profile, prompts=prompts, settings=settings)
    found = api.load_profile(profile)
    assert isinstance(found, FeatureProfile)
    rows, left_out = [], dict[str, str]()
    for budget in BUDGETS["diffusion"]:
        plans = {}
        for name in FEATURE_RECIPES:
            try:
                plans[name] = api.solve(found, budget=budget, recipe=name)
            except CacheplanError as error:
                left_out[f"{name} at {budget:g}"] = str(error)
        first = next(iter(plans.values()))
        opened = open_for_plan(first, model=model, settings=settings, device=None, dtype=None)
        file = options.model / "heldout.jsonl"
        heldout = picture_prompts_for(opened, file, "heldout", PROMPTS["diffusion"])
        measured, _ = measure_plans(opened.pipe, list(plans.values()), opened.call, heldout)
        for name, seen in zip(plans, measured, strict=True):
            rows.append(
                {
                    "budget": budget,
                    "recipe": name,
                    "error": seen.damage.error,
                    "error_interval": list(mean_interval(seen.error_per_prompt)),
                    "psnr": seen.damage.psnr,
                    "compute": seen.counted_flops / seen.full_flops,
                }
            )
        print(f"{budget:g}: {len(plans)} plans measured", file=sys.stderr, flush=True)
    about = {"architecture": found.model.architecture, "steps": found.model.steps}
    return {"model": about, "rows": rows, "left_out": left_out}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a folder of second_models.py")
    parser.add_argument("--profile", type=Path, help="measured beforehand on the calibration")
    parser.add_argument("--json", type=Path, help="also holds the runs of other models")
    options = parser.parse_args()
    family = api.family_of(str(options.model))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        made = language if family == "language" else diffusion
        found = made(options, Path(folder))
    print(recipe_table(found) if family == "language" else feature_table(found))
    if options.json:
        run = {**environment(), "prompts": PROMPTS[family], **found}
        store(options.json, f"{family}: {options.model.name}", run)


if __name__ == "__main__":
    main()
