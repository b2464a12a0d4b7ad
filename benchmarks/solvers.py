"""Time and gap of the solvers: a cache of 80 layers and 8 heads, a schedule of 60 sites.

    python benchmarks/solvers.py [--json FILE]

640 sites with 12 options each: six keep fractions at 16 bits and at 4 bits (4.5 with scales).
Distortions fall with the keep fraction at a pace of each head's own, carry the noise of a
measurement, and span several orders of magnitude between heads.

The schedule has 50 steps; between two computations each step takes the better of the last value
and the line through the last two, so that the last two keys are the state.  Its solvers are
named after the knapsack that divides the budget; "recurrence" keeps one predecessor per key, as
DPCache does, and proves nothing.  Seconds are the best of three.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cacheplan.environment import environment
from cacheplan.solvers.registry import knapsack_solver
from cacheplan.solvers.segments import forecast_costs, hold_costs
from cacheplan.solvers.shortest_path import ShortestPath
from cacheplan.types.problem import Floats, Knapsack, Schedule, Solution

SITES = 80 * 8
KEEPS = np.array([0.05, 0.1, 0.2, 0.35, 0.6, 1.0])
BITS = np.array([16.0, 4.5])
BUDGETS = (0.5, 0.3, 0.2, 0.1)
SOLVERS = ("lagrangian", "dynamic", "milp")
SCHEDULED, STEPS = 60, 50


def problem(budget: float, *, seed: int = 0) -> Knapsack:
    """A random problem of that size; rates are fractions of the full cache."""
    rng = np.random.default_rng(seed)
    weight = 10 ** rng.normal(-4, 1, size=(SITES, 1, 1))  # sensitivity of a head
    pace = rng.uniform(2, 12, size=(SITES, 1, 1))
    dropped = np.exp(-pace * KEEPS[:, None]) * (1 - KEEPS[:, None])
    coarse = np.where(BITS < 16, 10 ** rng.normal(-2.5, 0.5, size=(SITES, 1, 1)), 0.0)
    noise = np.exp(rng.normal(0, 0.15, size=(SITES, len(KEEPS), len(BITS))))
    distortion = weight * (dropped + coarse) * noise
    rate = np.broadcast_to(KEEPS[:, None] * BITS / 16 / SITES, distortion.shape)
    return Knapsack(rate.reshape(SITES, -1), distortion.reshape(SITES, -1), budget)


def features(*, seed: int = 0) -> Floats:
    """Smooth random paths of every site, `[sites, steps, 8]`."""
    rng = np.random.default_rng(seed)
    pace = np.exp(rng.normal(0, 0.7, size=(SCHEDULED, STEPS, 1)))
    velocity = np.cumsum(rng.normal(size=(SCHEDULED, STEPS, 8)) * pace, axis=1)
    return np.cumsum(velocity, axis=1) * np.exp(rng.normal(0, 1, size=(SCHEDULED, 1, 1)))


def schedule() -> Schedule:
    """The schedule without a budget; rates are fractions of all computations."""
    path, step = features(), np.arange(STEPS)
    lags, lines = [], []
    for site in path:
        gap = np.where(step > step[:, None], step - step[:, None], 1)[..., None]
        slope = (site - site[:, None]) / gap  # [i, j, 8]
        forecast = site[:, None] + slope[:, :, None] * (step - step[:, None])[..., None]
        lags.append(np.abs(site - site[:, None]).mean(-1))  # [i, t]
        lines.append(np.minimum(np.abs(forecast - site).mean(-1), lags[-1]))  # [i, j, t]
    rate = np.tile([1.0, 2.0], SCHEDULED // 2)  # attention and feed-forward
    return Schedule(
        rate=rate / (rate.sum() * STEPS),
        base=np.zeros(SCHEDULED),
        hold=hold_costs(lags),
        forecast=forecast_costs(lines),
        forced=np.zeros((SCHEDULED, STEPS), dtype=np.bool_),
        budget=1.0,
    )


def measure(what: str, name: str, budget: float, solve: Callable[[], Solution]) -> dict[str, Any]:
    """One row of the table."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        solution = solve()
        seconds.append(time.perf_counter() - started)
    return {
        "problem": what,
        "budget": budget,
        "solver": name,
        "seconds": min(seconds),
        "rate": solution.rate,
        "value": solution.value,
        "bound": solution.bound,
        "gap": solution.gap,
        "status": solution.status,
    }


def draw(row: dict[str, Any]) -> None:
    """Print one row."""
    gap = "" if row["gap"] is None else f"{100 * row['gap']:.4f} %"
    print(
        f"{row['problem']:<8} {row['budget']:>6} {row['solver']:<10} {row['seconds']:>8.3f} "
        f"{row['value']:>12.6g} {gap:>9}"
    )


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    arguments = parser.parse_args()
    print(f"{'problem':<8} {'budget':>6} {'solver':<10} {'seconds':>8} {'value':>12} {'gap':>9}")
    rows = []
    steps = schedule()
    for budget in BUDGETS:
        cache, scheduled = problem(budget), replace(steps, budget=budget)
        for name in SOLVERS:
            rows.append(measure("cache", name, budget, partial(knapsack_solver(name), cache)))
            draw(rows[-1])
        for name in SOLVERS:
            rows.append(measure("schedule", name, budget, partial(ShortestPath(name), scheduled)))
            draw(rows[-1])
        heuristic = partial(ShortestPath(exact=False), scheduled)
        rows.append(measure("schedule", "recurrence", budget, heuristic))
        draw(rows[-1])
    if arguments.json:
        report = environment() | {"rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
