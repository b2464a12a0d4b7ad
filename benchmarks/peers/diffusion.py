"""Peers and plans on one diffusion pipeline: the error of the final latent at equal counted FLOPs.

    python benchmarks/peers/diffusion.py [--profile FILE] [--json FILE] [--work FOLDER]
        [--limit N] [--tuning N] [--minutes M]

Needs `pip install cache-dit` besides cacheplan's extra `diffusion`.  The pipeline is the embedded
one; everybody starts from the same noise of the same held-out prompts and is compared with the full
run.  Every knob of a peer is swept on a few calibration prompts; of each curve, the settings around
the budgets are measured on held-out prompts and interpolated to the budgets.  Plans are measured at
their own compute, which is never more than the budget; refined ones have seen calibration prompts
alone.  `--work` keeps what was measured, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # also under PYTHONSAFEPATH

import cache_dit_caches
import diffusers_caches
import numpy as np
import planned_caches
import torch
from diffusers.utils import logging as diffusers_logging
from picture_curves import At, front, mean_error, place, wanted
from picture_runs import FULL, Bench, Measured, Setting
from rich.console import Console
from rich.table import Table

from cacheplan import api
from cacheplan.adapters.denoiser import load
from cacheplan.atomic import atomic_write
from cacheplan.environment import environment, installed_versions
from cacheplan.intervals import interval, resamples
from cacheplan.profilers.feature_prompts import load_picture_prompts
from cacheplan.types import FeaturePlan, FeatureProfile
from cacheplan.zoo import EMBEDDED_DIFFUSION_MODEL, embedded_call, embedded_prompts

BUDGETS = (0.7, 0.5, 0.4, 0.3)
COSTED = 0.5  # the budget at which time and memory are measured
GOAL = 1 / 3  # of the best peer's error
OURS = "cacheplan "
BASELINES = ("fewer steps", f"{OURS}uniform")
TUNED = 4  # other recipes per budget, those of the least predicted error, that are tried
NOT_RUN = {
    "diffusers TextKVCache": "hooks NucleusMoE blocks alone",
    "diffusers LayerSkip": "leaves layers out of all steps, for guidance: no cache",
    "cache-dit DBPrune": "prunes single blocks without a cache of steps: not measured",
    "TeaCache, SmoothCache, xDiT": "no package for this pipeline; the first two are recipes here",
}


class Notebook:
    """What was measured so far, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def measured(
        self, bench: Bench, name: str, setting: Setting, known: Measured | None = None
    ) -> Measured:
        key = f"{name} | {setting.method} | {setting.knob}"
        if key not in self.found:
            self.note(key, asdict(bench.measure(setting, known)))
            point = self.found[key]
            print(f"{key}: {point['compute']:.3f} {np.mean(point['errors']):.5f}", flush=True)
        return Measured(**self.found[key])

    def cost(self, bench: Bench, setting: Setting) -> dict[str, float]:
        key = f"cost | {setting.method} | {setting.knob}"
        if key not in self.found:
            self.note(key, bench.cost(setting))
        return dict(self.found[key])

    def note(self, key: str, value: Any) -> None:
        self.found[key] = value
        atomic_write(self.path, json.dumps(self.found).encode())


class Curve:
    """A method's settings, all measured on the tuning prompts and some on the held-out ones."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        self.settings = {setting.knob: setting for setting in settings}
        self.tuning: dict[str, Measured] = {}
        self.points: dict[str, Measured] = {}

    def measure(
        self,
        tune: Callable[[Setting], Measured],
        hold: Callable[[Setting], Measured],
    ) -> None:
        for knob, setting in self.settings.items():
            self.tuning[knob] = tune(setting)
        for budget in BUDGETS:
            while knob := wanted(self.points, self.tuning, budget):
                self.points[knob] = hold(self.settings[knob])


def fewer_steps(steps: int) -> list[Setting]:
    """The pipeline itself with the number of steps that each budget buys."""
    counts = [int(budget * steps + 1e-9) for budget in BUDGETS]
    return [replace(FULL, method="fewer steps", knob=f"{n} steps", steps=n) for n in counts]


@contextmanager
def folder(path: Path | None) -> Iterator[Path]:
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def peers(bench: Bench, call: dict[str, Any], notebook: Notebook) -> dict[str, Curve]:
    """Curves not yet measured, by method; MagCache is calibrated on the prompts of `bench`."""
    steps = call["num_inference_steps"]
    key = f"magnitudes of {len(bench.prompts)} prompts"
    if key not in notebook.found:
        run, pipe = bench.once, load(None)
        notebook.note(key, diffusers_caches.magnitudes(pipe, run, steps))
    every = [
        *fewer_steps(steps),
        *diffusers_caches.settings(steps, notebook.found[key]),
        *cache_dit_caches.settings(steps),
    ]
    methods = dict.fromkeys(setting.method for setting in every)
    return {name: Curve([s for s in every if s.method == name]) for name in methods}


def row(
    method: str, budget: float, points: dict[str, Measured], at: At | None, bench: Bench
) -> dict[str, Any]:
    """A method at a budget, as the JSON has it."""
    found: dict[str, Any] = {"method": method, "budget": budget}
    if at is None:
        lowest = min((point.compute for point in points.values()), default=None)
        return {**found, "lowest_compute": lowest}
    errors = at.error(points, resamples(len(bench.prompts)))
    every = np.arange(len(bench.prompts))[None]
    low, high = interval(errors)
    return {
        **found,
        "error": float(at.error(points, every)[0]),
        "low": low,
        "high": high,
        "psnr": at.value(points, lambda p: float(-10 * np.log10(np.mean(p.squares)))),
        "ssim": at.value(points, lambda p: float(np.mean(p.ssim))),
        "distance": at.value(points, lambda p: p.distance) - bench.full.distance,
        "compute": at.value(points, lambda p: p.compute),
        "settings": [
            {"knob": name, "compute": points[name].compute, "error": mean_error(points[name])}
            for name in at.names
        ],
    }


def summary(rows: list[dict[str, Any]], errors: dict[tuple[str, float], Any]) -> dict[str, Any]:
    """Our best row against the best peer's at every budget; ratios with paired intervals."""
    found = {}
    for budget in BUDGETS:
        here = {r["method"]: r["error"] for r in rows if r["budget"] == budget and "error" in r}
        ours = {m: e for m, e in here.items() if m.startswith(OURS) and m not in BASELINES}
        others = {m: e for m, e in here.items() if not m.startswith(OURS) and m not in BASELINES}
        best, peer = min(ours, key=lambda m: ours[m]), min(others, key=lambda m: others[m])
        low, high = interval(errors[best, budget] / errors[peer, budget])
        found[f"{budget:g}"] = {
            "best": best,
            "peer": peer,
            "ratio": ours[best] / others[peer],
            "low": low,
            "high": high,
            "goal": ours[best] <= GOAL * others[peer],
            "ratio_to_fewer_steps": ours[best] / here["fewer steps"],
        }
    return found


def compare(
    profile: FeatureProfile, work: Path, limit: int, tuning: int, minutes: float
) -> dict[str, Any]:
    pipe, name = load(None), EMBEDDED_DIFFUSION_MODEL
    call = {**embedded_call(name), **json.loads(profile.model.call)}
    notebook = Notebook(work / "measured.json")
    tuned, held = (
        Bench(pipe, call, load_picture_prompts(embedded_prompts(name, split), limit=count))
        for split, count in (("calibration", tuning), ("heldout", limit))
    )

    def tune(setting: Setting) -> Measured:
        return notebook.measured(tuned, f"tuning {tuning}", setting)

    def hold(setting: Setting) -> Measured:
        return notebook.measured(held, f"held out {limit}", setting, tune(setting))

    rows: list[dict[str, Any]] = []
    errors: dict[tuple[str, float], Any] = {}
    costs: list[dict[str, Any]] = []
    left_out = dict(NOT_RUN)

    def add(method: str, budget: float, points: dict[str, Measured], at: At | None) -> None:
        rows.append(row(method, budget, points, at, held))
        if at is not None:
            errors[method, budget] = at.error(points, resamples(limit))

    def cost(setting: Setting, compute: float) -> None:
        found = {"method": setting.method, "compute": compute, **notebook.cost(held, setting)}
        costs.append(found)

    cost(FULL, 1.0)
    for method, curve in peers(tuned, call, notebook).items():
        curve.measure(tune, hold)
        for budget in BUDGETS:
            add(method, budget, curve.points, place(curve.points, budget))
        near = min(front(curve.points), key=lambda k: abs(curve.points[k].compute - COSTED))
        cost(curve.settings[near], curve.points[near].compute)
    plans = planned_caches.plans(profile, BUDGETS, left_out)
    settings = {key: planned_caches.setting(key[0], plan) for key, plan in plans.items()}
    chosen = _chosen(plans, lambda key: mean_error(tune(settings[key])))
    for budget in BUDGETS:
        plan = planned_caches.refined(plans["planned", budget], profile, work, minutes)
        key = planned_caches.REFINED, budget
        settings[key] = planned_caches.setting(key[0], plan)
        chosen.add(key)
    for key in sorted(chosen, key=lambda key: (key[0], -key[1])):
        setting, budget = settings[key], key[1]
        point = hold(setting)
        add(setting.method, budget, {setting.knob: point}, At((setting.knob,)))
        if budget == COSTED:
            cost(setting, point.compute)
    for found in costs:
        found["time"] = found["seconds"] / costs[0]["seconds"]
    return {
        "summary": summary(rows, errors),
        "prompts": {"tuning": tuning, "heldout": limit},
        "rows": rows,
        "costs": costs,
        "left_out": left_out,
    }


def _chosen(
    plans: dict[tuple[str, float], FeaturePlan], tuned: Callable[[tuple[str, float]], float]
) -> set[tuple[str, float]]:
    """`planned`, `uniform`, and at each budget the recipe that is best on tuning prompts.

    Online recipes are none of them: their compute is an expectation.
    """
    always = ("planned", "uniform")
    found = {key for key in plans if key[0] in always}
    for budget in BUDGETS:
        others = [key for key, plan in plans.items() if key[1] == budget and plan.gate is None]
        others = [key for key in others if key[0] not in always]
        others.sort(key=lambda key: _predicted(plans[key]))
        found.add(min(others[:TUNED], key=tuned))
    return found


def _predicted(plan: FeaturePlan) -> float:
    return plan.predicted.error if plan.predicted else np.inf


def tables(result: dict[str, Any]) -> list[Table]:
    rows = result["rows"]
    shown = Table("error of the final latent, PSNR", *(f"compute {b:g}" for b in BUDGETS))
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for budget in BUDGETS:
            here = [r for r in rows if (r["method"], r["budget"]) == (method, budget)]
            found = next((r for r in here if "error" in r), None)
            text = "{error:.4f} [{low:.4f}, {high:.4f}] {psnr:.1f}"
            cells.append(text.format(**found) if found else ("-" if not here else "not reached"))
        shown.add_row(method, *cells)
    costs = Table("one picture", "compute", "CPU time", "peak MiB")
    for found in result["costs"]:
        numbers = found["compute"], found["time"], found["bytes"] / 2**20
        costs.add_row(found["method"], *(f"{number:.2f}" for number in numbers))
    return [shown, costs]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", type=Path, help="of the embedded model; measured if not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="keeps what was measured")
    parser.add_argument("--limit", type=int, default=32, help="held-out prompts")
    parser.add_argument("--tuning", type=int, default=6, help="calibration prompts for the sweeps")
    parser.add_argument("--minutes", type=float, default=3, help="to refine each plan")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    with folder(arguments.work) as work:
        path = arguments.profile or work / "profile.safetensors"
        if not path.exists():
            api.profile(family="diffusion", out=path)
        profile = api.load_profile(path)
        assert isinstance(profile, FeatureProfile)
        found = compare(profile, work, arguments.limit, arguments.tuning, minutes=arguments.minutes)
    for table in tables(found):
        Console(width=160).print(table)
    print(json.dumps(found["summary"], indent=1))
    if arguments.json:
        about = environment()
        about["versions"] = dict(installed_versions("diffusers", "cache-dit"))
        arguments.json.write_text(json.dumps({**about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
