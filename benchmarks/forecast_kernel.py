"""Time of the forecast kernel on a GPU: plain torch, torch.compile of it, and Triton.

    python benchmarks/forecast_kernel.py [--json FILE]

The tensors are those of one block's features in image and video transformers.  Every variant is
first compared with float64; one that is wrong gets no time.  Calls go round sets of inputs that
together exceed the L2 cache several times.  Per round each variant is timed once, in alternating
order; times are medians over rounds, ratios medians of the rounds' own.  "eager" includes the
launches as a pipeline pays them, "graph" replays the same calls from a CUDA graph.  torch.compile
sees constant weights here, which favours it; the kernel takes new weights at every step.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cacheplan.environment import environment
from cacheplan.kernels.forecast import naive

SHAPES = {  # [B, tokens, channels]
    "PixArt 512 px, guided": (2, 1024, 1152),
    "FLUX 1024 px": (1, 4608, 3072),
    "Wan 480p, 81 frames": (1, 32760, 5120),
}
WEIGHTS = (2.6, -2.1, 0.6, -0.1)
CASES = ((1, False), (2, False), (3, False), (3, True), (4, True))  # features, channels' map
ROUNDS = 7
TOLERANCE = 4e-3  # of a result in bfloat16, relative in the norm

Inputs = tuple[list[Tensor], tuple[float, ...], Tensor | None, Tensor | None, Tensor]
Combine = Callable[..., Tensor]


def variants() -> dict[str, Combine]:
    from cacheplan.kernels.forecast import triton

    return {
        "naive": naive.combine,
        "compile": torch.compile(naive.combine, dynamic=False),
        "triton": triton.combine,
    }


def inputs(shape: tuple[int, ...], features: int, channels: bool) -> Inputs:
    """One set in bfloat16; the map per channel in float32, as plans store it."""
    tensors = [torch.randn(shape, device="cuda").bfloat16() for _ in range(features + 1)]
    maps = torch.randn(2, shape[-1], device="cuda") if channels else (None, None)
    return tensors[1:], WEIGHTS[:features], maps[0], maps[1], tensors[0]


def error(combine: Combine, given: Inputs) -> float:
    """Relative error in the norm against float64."""
    features, weights, scale, shift, add = given
    wide = [None if tensor is None else tensor.double() for tensor in (scale, shift, add)]
    expected = naive.combine([feature.double() for feature in features], weights, *wide)
    return float((combine(*given).double() - expected).norm() / expected.norm())


def calling(combine: Combine, sets: list[Inputs]) -> Callable[[], object]:
    def run() -> None:
        for given in sets:
            combine(*given)

    return run


def microseconds(run: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1000 * float(start.elapsed_time(end)) / calls


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The same launches as one CUDA graph, after a warm-up on another stream."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def times(runs: dict[str, Callable[[], object]], calls: int) -> dict[str, list[float]]:
    """Microseconds per call of every variant in every round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    for index in range(ROUNDS):
        for name in list(runs) if index % 2 == 0 else reversed(runs):
            found[name].append(microseconds(runs[name], calls))
    return found


def measure(model: str, features: int, channels: bool) -> list[dict[str, Any]]:
    """The rows of one shape and one case."""
    shape = SHAPES[model]
    counted = (features + 2) * 2 * math.prod(shape) + 8 * channels * shape[-1]  # add and result
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = [inputs(shape, features, channels) for _ in range(max(2, -(-4 * cache // counted)))]
    torch.compiler.reset()  # or the next case would count against the limit of recompilations
    combines = variants()
    errors = {name: error(combine, sets[0]) for name, combine in combines.items()}
    runs = {name: calling(combines[name], sets) for name in combines if errors[name] < TOLERANCE}
    eager = times(runs, len(sets))
    graph = times({name: captured(run) for name, run in runs.items()}, len(sets))
    return [
        {
            "model": model,
            "features": features,
            "channels": channels,
            "variant": name,
            "error": errors[name],
            "bytes": counted,
            "eager_us": median(eager[name]) if name in runs else None,
            "graph_us": median(graph[name]) if name in runs else None,
            "graph_us_range": [min(graph[name]), max(graph[name])] if name in runs else None,
            "graph_gb_per_s": counted / median(graph[name]) / 1e3 if name in runs else None,
            "graph_speedup": ratio(graph, name),
            "eager_speedup": ratio(eager, name),
        }
        for name in errors
    ]


def ratio(found: dict[str, list[float]], name: str) -> float | None:
    """How many times faster than naive, round by round."""
    if name not in found or "naive" not in found:
        return None
    return median(n / own for n, own in zip(found["naive"], found[name], strict=True))


def copy_bandwidth() -> float:
    """GB/s of copying 4 GB within the device, bytes read and written."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = times({"copy": lambda: target.copy_(source)}, 1)["copy"]
    return 2 * source.numel() / median(found) / 1e3


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("The forecast kernel is timed on a GPU; torch finds no CUDA here.", file=sys.stderr)
        raise SystemExit(2)
    torch.manual_seed(0)
    copy = copy_bandwidth()
    print(f"copy {copy:.0f} GB/s")
    print(f"{'model':<22} {'case':<12} {'variant':<8} {'eager us':>9} {'graph us':>9} {'GB/s':>6}")
    rows = []
    for model in SHAPES:
        for features, channels in CASES:
            for row in measure(model, features, channels):
                rows.append(row)
                case = f"{features}{' + channels' if channels else ''}"
                start = f"{model:<22} {case:<12} {row['variant']:<8}"
                if row["graph_us"] is None:
                    print(f"{start} wrong: relative error {row['error']:.2g}", flush=True)
                    continue
                print(
                    f"{start} {row['eager_us']:>9.1f} {row['graph_us']:>9.1f} "
                    f"{row['graph_gb_per_s']:>6.0f}",
                    flush=True,
                )
    if arguments.json:
        report = environment() | {
            "gpu": torch.cuda.get_device_name(),
            "triton": version("triton"),
            "copy_gb_per_s": copy,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
