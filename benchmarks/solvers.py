"""Time and gap of the knapsack solvers on a model of 80 layers and 8 key-value heads.

    python benchmarks/solvers.py [--json FILE]

640 sites with 12 options each: six keep fractions at 16 bits and at 4 bits (4.5 with scales).
Distortions fall with the keep fraction at a pace of each head's own, carry the noise of a
measurement, and span several orders of magnitude between heads.  Seconds are the best of three.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from cacheplan.environment import environment
from cacheplan.solvers.registry import knapsack_solver
from cacheplan.types.problem import Knapsack

SITES = 80 * 8
KEEPS = np.array([0.05, 0.1, 0.2, 0.35, 0.6, 1.0])
BITS = np.array([16.0, 4.5])
BUDGETS = (0.5, 0.3, 0.2, 0.1)
SOLVERS = ("lagrangian", "dynamic", "milp")


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


def measure(name: str, budget: float) -> dict[str, Any]:
    """One row of the table."""
    solver, task = knapsack_solver(name), problem(budget)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        solution = solver(task)
        seconds.append(time.perf_counter() - started)
    return {
        "budget": budget,
        "solver": name,
        "seconds": min(seconds),
        "rate": solution.rate,
        "value": solution.value,
        "bound": solution.bound,
        "gap": solution.gap,
        "status": solution.status,
    }


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    arguments = parser.parse_args()
    print(f"{'budget':>6} {'solver':<10} {'seconds':>8} {'value':>12} {'bound':>12} {'gap':>9}")
    rows = []
    for budget in BUDGETS:
        for name in SOLVERS:
            row = measure(name, budget)
            rows.append(row)
            print(
                f"{budget:>6} {name:<10} {row['seconds']:>8.3f} {row['value']:>12.6g} "
                f"{row['bound']:>12.6g} {100 * row['gap']:>7.4f} %"
            )
    if arguments.json:
        report = environment() | {"rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
