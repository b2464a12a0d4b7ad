"""Time of decode attention on a GPU: full and ragged, 16-bit and quantised, beside torch's.

    python benchmarks/decode_kernels.py [--json FILE] [--interpreter]

One layer of a model with 32 query and 8 key-value heads of 128 channels, one new token per
sequence.  Every variant is first compared with float64 on some of its rows; one that is wrong gets
no time.  Calls go round sets of caches that together exceed the L2 cache several times.  Per round
each variant is timed once, in alternating order; times are medians over rounds of replayed CUDA
graphs, ratios medians of the rounds' own.  "20 %" keeps a fifth of the tokens, unevenly over heads.
Quantised variants keep the latest 128 tokens in 16 bits.  Beside them stand transformers' quantised
caches, which unpack all tokens at every step; those whose package is missing are named.  Without a
GPU, --interpreter compares small sizes with float64 and times nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from decode_variants import (
    FLASH,
    FULL,
    HKV,
    OURS,
    THEIRS,
    Call,
    D,
    Variant,
    flash,
    inputs,
    ours,
    theirs,
)

from cacheplan.environment import environment

BATCHES, CONTEXTS = (1, 8, 32), (8192, 32768, 131072)
ROUNDS = 5
TOLERANCE = 5e-3  # relative in the norm: operands of products are 16-bit
BUDGET = 400.0  # seconds after which the remaining shapes are skipped


def microseconds(run: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1000 * float(start.elapsed_time(end)) / calls


def every(calls: list[Call]) -> Callable[[], object]:
    def run() -> None:
        for call in calls:
            call()

    return run


def captured(calls: list[Call]) -> Callable[[], object]:
    """The calls as one CUDA graph, after a warm-up on another stream."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        every(calls)()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        every(calls)()
    return graph.replay


def rounds(runs: dict[str, tuple[Callable[[], object], int]]) -> dict[str, list[float]]:
    """Microseconds per call of every variant in every round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run, _ in runs.values():
        for _ in range(3):
            run()
    for index in range(ROUNDS):
        for name in list(runs) if index % 2 == 0 else reversed(runs):
            found[name].append(microseconds(*runs[name]))
    return found


def measure(B: int, L: int, copy: float) -> list[dict[str, Any]]:
    """The rows of one shape."""
    device = torch.cuda.get_device_properties(0)
    variants: dict[str, Variant] = {}
    notes: dict[str, str] = {}
    for name, (share, key, _) in OURS.items():
        size = 4 * B * HKV * L * D * share * (1 if key is None else key.bits / 16)
        sets = max(1, math.ceil(4 * device.L2_cache_size / size))
        given = inputs(B, L, name, sets, "cuda", torch.bfloat16)
        variants[name] = ours(given, device.multi_processor_count)
        if name == FULL:
            variants[FLASH] = flash(given)
    for name in THEIRS:
        found = theirs(B, L, name, "cuda", torch.bfloat16)
        if isinstance(found, str):
            notes[name] = found
        else:
            variants[name] = found
    right = {
        name: own for name, own in variants.items() if own.error is None or own.error < TOLERANCE
    }
    eager = rounds({name: (every(own.calls), len(own.calls)) for name, own in right.items()})
    graphs = {
        name: (captured(own.calls), len(own.calls))
        for name, own in right.items()
        if name not in THEIRS  # they allocate as they go
    }
    graph = eager | rounds(graphs)
    rows: list[dict[str, Any]] = []
    for name in (FLASH, *OURS, *THEIRS):
        row: dict[str, Any] = {"batch": B, "context": L, "variant": name}
        if name in notes:
            rows.append(row | {"note": notes[name]})
            continue
        own = variants[name]
        row |= {"error": own.error, "bytes": own.counted, "captured": name in graphs}
        if name in right:
            each = median(graph[name])
            row |= {
                "us": each,
                "us_range": [min(graph[name]), max(graph[name])],
                "eager_us": median(eager[name]),
                "gb_per_s": own.counted / each / 1e3,
                "of_copy": own.counted / each / 1e3 / copy,
                "times_flash": ratio(graph, FLASH, name),
                "times_ours_bf16": ratio(graph, FULL, name),
            }
        rows.append(row)
    return rows


def ratio(found: dict[str, list[float]], base: str, name: str) -> float | None:
    """How many times faster than the base, round by round."""
    if base not in found:
        return None
    return median(n / own for n, own in zip(found[base], found[name], strict=True))


def copy_bandwidth() -> float:
    """GB/s of copying 8 GB within the device, bytes read and written."""
    source = torch.randint(0, 256, (2**33,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = rounds({"copy": (lambda: target.copy_(source), 1)})["copy"]
    return 2 * source.numel() / median(found) / 1e3


def interpreted() -> list[dict[str, Any]]:
    """Every variant at a small size on the CPU, ours in Triton's interpreter, against float64."""
    B, L, dtype = 2, 1280, torch.float16
    rows: list[dict[str, Any]] = []
    for name in (FLASH, *OURS, *THEIRS):
        found: Variant | str
        if name in THEIRS:
            found = theirs(B, L, name, "cpu", dtype)
        else:
            given = inputs(B, L, FULL if name == FLASH else name, 1, "cpu", dtype)
            found = flash(given) if name == FLASH else ours(given, processors=4)
        row: dict[str, Any] = {"batch": B, "context": L, "variant": name}
        if isinstance(found, str):
            words, row = found, row | {"note": found}
        else:
            words, row = f"{found.counted} bytes", row | {"bytes": found.counted}
            if found.error is not None:
                words, row = (
                    f"{words}, relative error {found.error:.1e}",
                    row | {"error": found.error},
                )
        rows.append(row)
        print(f"{name:<25} {words}", flush=True)
    return rows


def driver() -> dict[str, str]:
    """The driver and the clocks as they are; nothing is set."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    values = run.stdout.splitlines()[0].split(",")
    return dict(zip(fields.split(","), map(str.strip, values), strict=True))


def report_row(row: dict[str, Any]) -> str:
    start = f"{row['batch']:>5} {row['context']:>7} {row['variant']:<25}"
    if "note" in row:
        return f"{start} {row['note']}"
    if "us" not in row:
        return f"{start} wrong: relative error {row['error']:.2g}"
    flash_ratio = f"{row['times_flash']:>7.2f}" if row["times_flash"] else " " * 7
    return (
        f"{start} {row['us']:>9.1f} {row['eager_us']:>9.1f} {row['gb_per_s']:>6.0f} "
        f"{100 * row['of_copy']:>5.0f} % {flash_ratio}"
    )


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parser.add_argument(
        "--interpreter", action="store_true", help="without a GPU: correctness at small sizes"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = environment() | {"triton": version("triton"), "seed": 0}
    if arguments.interpreter:
        print("No GPU is used: Triton's interpreter on the CPU, errors only, no times.")
        report |= {"gpu": None, "interpreter": True, "rows": interpreted()}
        wrong = [row["variant"] for row in report["rows"] if not row.get("error", 0) < TOLERANCE]
    elif not torch.cuda.is_available():
        print("Decode attention is timed on a GPU; torch finds no CUDA here.", file=sys.stderr)
        raise SystemExit(2)
    else:
        began = time.monotonic()
        device = torch.cuda.get_device_properties(0)
        copy = copy_bandwidth()
        print(f"{device.name}: copy {copy:.0f} GB/s")
        print(f"batch context {'variant':<25} {'us':>9} {'eager us':>9}   GB/s of copy x flash")
        rows: list[dict[str, Any]] = []
        skipped = []
        for B, L in sorted(((b, c) for b in BATCHES for c in CONTEXTS), key=math.prod):
            if time.monotonic() - began > BUDGET:
                skipped.append([B, L])
                continue
            for row in measure(B, L, copy):
                rows.append(row)
                print(report_row(row), flush=True)
            torch.cuda.empty_cache()
        if skipped:
            print(f"Skipped for time, batch and context: {skipped}")
        report |= {
            "gpu": device.name,
            "multiprocessors": device.multi_processor_count,
            "l2_bytes": device.L2_cache_size,
            "copy_gb_per_s": copy,
            "skipped": skipped,
            "rows": rows,
        } | driver()
        wrong = [row["variant"] for row in rows if "error" in row and "us" not in row]
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if wrong:
        raise SystemExit(f"Wrong results: {', '.join(sorted(set(wrong)))}.")


if __name__ == "__main__":
    if "--interpreter" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton's functions are decorated
    main()
