"""Every feature recipe at several budgets on held-out prompts: error, PSNR, FLOPs, seconds.

    python benchmarks/features.py [--profile FILE] [--json FILE] [--plot FILE.png] [--limit N]

Without --profile, the embedded diffusion model is profiled first.  All arms start from the same
noise and are compared with the full run; "fewer steps" is the pipeline itself, called with the
number of steps that the budget buys.  FLOPs are counted on the first batch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

import cacheplan
from cacheplan import api
from cacheplan.adapters.denoiser import load
from cacheplan.adapters.flops import flop_counter
from cacheplan.adapters.loop import Loop, watching
from cacheplan.adapters.sampling import run_pipeline
from cacheplan.environment import environment
from cacheplan.errors import InfeasibleError, UnsupportedError
from cacheplan.profilers.feature_prompts import load_picture_prompts
from cacheplan.recipes import FEATURE_RECIPES
from cacheplan.types import FeatureProfile
from cacheplan.zoo import EMBEDDED_DIFFUSION_MODEL, embedded_call, embedded_prompts

BUDGETS = (0.7, 0.5, 0.4, 0.3)
BATCH = 8
FEWER = "fewer steps"


def run(pipe: Any, call: dict[str, Any], batches: list[tuple[list[str], int]]) -> dict[str, Any]:
    """Latents and pictures of all batches, seconds of sampling, FLOPs of the first batch."""
    latents, seconds = [], 0.0
    for prompts, seed in batches:
        started = time.perf_counter()
        latents.append(run_pipeline(pipe, {**call, "prompt": prompts}, seed=seed).latent)
        seconds += time.perf_counter() - started
    flops: list[int] = []

    def on_call(loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with flop_counter() as counter:
            output = inner(*args, **kwargs)
        flops.append(counter.get_total_flops())
        return output

    with watching(pipe, on_call=on_call):
        run_pipeline(pipe, {**call, "prompt": batches[0][0]}, seed=batches[0][1])
    found = torch.cat(latents)
    return {
        "latent": found,
        "pictures": decode(pipe, found),
        "seconds": seconds,
        "flops": sum(flops),
    }


@torch.no_grad()
def decode(pipe: Any, latent: Tensor) -> Tensor:
    """Pictures from 0 to 1."""
    made = pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample
    return (made / 2 + 0.5).clamp(0, 1)


def compared(found: dict[str, Any], full: dict[str, Any]) -> dict[str, float]:
    """Errors against the full run: mean, median and worst prompt, and PSNR of the mean square."""
    difference = (found["latent"] - full["latent"]).flatten(1).norm(dim=1)
    error = difference / full["latent"].flatten(1).norm(dim=1)
    square = (found["pictures"] - full["pictures"]).square().mean()
    return {
        "error": float(error.mean()),
        "median_error": float(error.median()),
        "worst_error": float(error.max()),
        "psnr": float(-10 * torch.log10(square)),
        "compute": found["flops"] / full["flops"],
        "seconds": found["seconds"],
        "speedup": full["seconds"] / found["seconds"],
    }


@contextmanager
def profiled(path: Path | None) -> Iterator[FeatureProfile]:
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = Path(folder) / "profile.safetensors"
            api.profile(family="diffusion", out=path, ablate=4)
        found = api.load_profile(path)
        assert isinstance(found, FeatureProfile)
        yield found


def measure(profile: FeatureProfile, limit: int | None) -> list[dict[str, Any]]:
    pipe = load(None)
    call = {**embedded_call(EMBEDDED_DIFFUSION_MODEL), **json.loads(profile.model.call)}
    prompts = load_picture_prompts(
        embedded_prompts(EMBEDDED_DIFFUSION_MODEL, "heldout"), limit=limit
    )
    groups = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    batches = [([p.text for p in group], group[0].seed) for group in groups]
    full = run(pipe, call, batches)
    rows: list[dict[str, Any]] = []
    for budget in BUDGETS:
        steps = int(budget * profile.model.steps + 1e-9)
        arms: dict[str, Any] = {FEWER: None, **dict.fromkeys(FEATURE_RECIPES)}
        for name in arms:
            row: dict[str, Any] = {"budget": budget, "recipe": name}
            if name == FEWER:
                found = run(pipe, {**call, "num_inference_steps": steps}, batches)
            else:
                try:
                    plan = api.solve(profile, budget=budget, recipe=name)
                except (InfeasibleError, UnsupportedError) as error:
                    print(f"{budget:<4} {name:12} left out: {error}", flush=True)
                    continue
                row |= {"planned_compute": plan.budget.reached, "gap": plan.certificate.gap}
                if plan.predicted is not None:
                    row["predicted_error"] = plan.predicted.error
                with cacheplan.apply(pipe, plan):
                    found = run(pipe, call, batches)
            row |= compared(found, full)
            rows.append(row)
            print(
                f"{budget:<4} {name:12} error {row['error']:.4f} "
                f"(predicted {row.get('predicted_error', np.nan):.4f}) PSNR {row['psnr']:.1f} "
                f"compute {row['compute']:.3f} speedup {row['speedup']:.2f}",
                flush=True,
            )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far `planned` is ahead at each budget, and how good predictions are."""
    ahead = {}
    for budget in BUDGETS:
        here = {row["recipe"]: row["error"] for row in rows if row["budget"] == budget}
        others = {name: error for name, error in here.items() if name not in ("planned", FEWER)}
        best = min(others, key=lambda name: others[name])
        ahead[str(budget)] = {
            "best_other": best,
            "ratio": here["planned"] / others[best],
            "ratio_to_fewer_steps": here["planned"] / here[FEWER],
        }
    planned = [row for row in rows if "predicted_error" in row]
    ratios = [row["error"] / row["predicted_error"] for row in planned]
    rank = spearmanr([r["error"] for r in planned], [r["predicted_error"] for r in planned])
    return {
        "planned_over_best_other": ahead,
        "rank_correlation": float(rank.statistic),
        "measured_over_predicted": [min(ratios), max(ratios)],
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("recipe", *(f"{b:g}: error (pred.), PSNR, compute" for b in BUDGETS))
    for name in dict.fromkeys(row["recipe"] for row in rows):  # not those for UNets
        cells = []
        for budget in BUDGETS:
            row = next((r for r in rows if r["recipe"] == name and r["budget"] == budget), None)
            if row is None:
                cells.append("infeasible")
                continue
            predicted = row.get("predicted_error")
            words = f" ({predicted:.4f})" if predicted is not None else ""
            cells.append(f"{row['error']:.4f}{words}  {row['psnr']:.1f}  {row['compute']:.2f}")
        shown.add_row(name, *cells)
    return shown


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.4), layout="constrained")
    for name in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == name]
        style: dict[str, Any] = {"alpha": 0.8}
        if name == "planned":
            style = {"linewidth": 3, "color": "black"}
        if name == FEWER:
            style = {"linewidth": 2, "color": "grey", "linestyle": ":"}
        compute, errors = [r["compute"] for r in mine], [r["error"] for r in mine]
        axis.plot(compute, errors, marker="o", label=name, **style)
    axis.set(xlabel="counted FLOPs, share of the full run", ylabel="error of the final latent")
    axis.set_yscale("log")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.suptitle("Embedded diffusion model, held-out prompts (lower is better)")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    with profiled(arguments.profile) as profile:
        rows = measure(profile, arguments.limit)
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
