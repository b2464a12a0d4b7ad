"""Time of decode attention on a GPU: full and ragged, 16-bit and quantised, beside torch's.

    python benchmarks/decode_kernels.py [--json FILE] [--interpreter]

One layer of a model with 32 query and 8 key-value heads of 128 channels, one new token per
sequence.  Every variant is first compared with float64 on some of its rows; one that is wrong gets
no time.  Calls go round sets of caches that together exceed the L2 cache several times.  Per round
each variant is timed once, in alternating order; times are medians over rounds of replayed CUDA
graphs, ratios medians of the rounds' own.  "20 %" keeps a fifth of the tokens, unevenly over heads.
Quantised variants keep the latest 128 tokens in 16 bits.  Without a GPU, --interpreter compares
small sizes with float64 and times nothing.
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
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cacheplan.environment import environment
from cacheplan.kernels.decode_attention import naive
from cacheplan.kernels.decode_attention.segments import Segment, divide
from cacheplan.kernels.quantize.packed import Format, Packed

HKV, GROUP, D = 8, 4, 128
SCALE = D**-0.5
BATCHES, CONTEXTS = (1, 8, 32), (8192, 32768, 131072)
SHARES = (0.05, 0.05, 0.1, 0.1, 0.15, 0.2, 0.35, 0.6)  # of the tokens, by head; 0.2 on average
RECENT = 128
ROUNDS = 5
TOLERANCE = 5e-3  # relative in the norm: operands of products are 16-bit
BUDGET = 400.0  # seconds after which the remaining shapes are skipped

K4, V4 = Format("int4", "channel", 64), Format("int4", "token")
K2, V2 = Format("int2", "channel", 64), Format("int2", "token", 64)
FP8 = Format("fp8", "token")
FULL, FLASH, QUANTO = "ours bf16", "SDPA flash", "transformers quanto int4"
OURS = {  # share of the tokens, formats of keys and values
    FULL: (1.0, None, None),
    "ours 20 %": (0.2, None, None),
    "ours 20 % int4": (0.2, K4, V4),
    "ours int4": (1.0, K4, V4),
    "ours int2": (1.0, K2, V2),
    "ours fp8": (1.0, FP8, FP8),
}

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Variant:
    """Calls on different memory, the bytes that one reads, and its error if it is compared."""

    calls: list[Call]
    counted: int
    error: float | None


def kept_lengths(B: int, L: int, share: float) -> list[int]:
    """Tokens per row, multiples of 64."""
    shares = [1.0] * HKV if share == 1 else SHARES
    return [64 * max(1, round(part * L / 64)) for _ in range(B) for part in shares]


def random_pool(N: int, format: Format | None, device: str, dtype: torch.dtype) -> Tensor | Packed:
    """N tokens: random numbers, or random codes whose numbers are of the same size."""
    if format is None:
        return torch.randn(N, D, device=device, dtype=dtype)
    codes = torch.randint(0, 256, (N, D // format.planes), device=device, dtype=torch.uint8)
    group = format.group or D
    shape = (N // group, D) if format.axis == "channel" else (N, D // group)
    noise = 0.75 + 0.5 * torch.rand(shape, device=device)
    if format.number == "fp8":
        codes &= 0xBF  # below 2: no NaN, and of ordinary size
        return Packed(codes, noise.half(), None, None, format)
    scale = (noise * 3.5 / format.levels).half()
    zero = (-1.75 * noise).half()
    return Packed(codes, scale, zero, None, format)


def storage(pool: Tensor | Packed) -> int:
    return pool.nbytes if isinstance(pool, Packed) else pool.numel() * pool.element_size()


def random_segments(B: int, L: int, name: str, device: str, dtype: torch.dtype) -> list[Segment]:
    share, key, value = OURS[name]
    lengths = kept_lengths(B, L, share)
    parts = [(lengths, key, value)]
    if key is not None:
        parts = [([n - min(n, RECENT) for n in lengths], key, value)]
        parts.append(([min(n, RECENT) for n in lengths], None, None))
    segments = []
    for own, k, v in parts:
        starts = [sum(own[:r]) for r in range(len(own))]
        keys, values = (random_pool(sum(own), format, device, dtype) for format in (k, v))
        offsets, counts = torch.tensor([starts, own], dtype=torch.int32, device=device)
        segments.append(Segment(keys, values, offsets, counts))
    return segments


def row_error(found: Tensor, query: Tensor, segments: list[Segment]) -> float:
    """Relative error against float64 of the first, a middle and the last row."""
    rows = len(segments[0].lengths)
    worst = 0.0
    for r in (0, rows // 2, rows - 1):
        own = [
            Segment(s.keys, s.values, s.offsets[r : r + 1], s.lengths[r : r + 1]) for s in segments
        ]
        folded = query.double().view(rows, GROUP, D)[r : r + 1]
        expected = naive.decode_attention(folded, own, scale=SCALE)
        off = found.double().reshape(rows, GROUP, D)[r : r + 1] - expected
        error = float(off.norm() / expected.norm())
        worst = error if math.isnan(error) else max(worst, error)
    return worst


def inputs(
    B: int, L: int, name: str, sets: int, device: str, dtype: torch.dtype
) -> list[tuple[Tensor, list[Segment]]]:
    """Queries and caches on different memory."""
    return [
        (
            torch.randn(B, HKV * GROUP, D, device=device).to(dtype),
            random_segments(B, L, name, device, dtype),
        )
        for _ in range(sets)
    ]


def variant(given: list[tuple[Tensor, list[Segment]]], calls: list[Call]) -> Variant:
    query, segments = given[-1]
    counted = sum(storage(s.keys) + storage(s.values) for s in segments)
    return Variant(calls, counted, row_error(calls[-1](), query, segments))


def ours(given: list[tuple[Tensor, list[Segment]]], processors: int) -> Variant:
    from cacheplan.kernels.decode_attention import triton

    calls: list[Call] = []
    for query, segments in given:
        lengths = [segment.lengths.tolist() for segment in segments]
        work = divide(lengths, processors=processors, device=query.device)
        calls.append(partial(triton.decode_attention, query, segments, work, scale=SCALE))
    return variant(given, calls)


def flash(given: list[tuple[Tensor, list[Segment]]]) -> Variant:
    """torch's flash kernel on full caches; pinned, as it else falls to a slow one silently."""
    calls: list[Call] = []
    for query, (whole,) in given:
        assert isinstance(whole.keys, Tensor)
        assert isinstance(whole.values, Tensor)
        shape = query.shape[0], HKV, -1, D
        keys, values = whole.keys.view(shape), whole.values.view(shape)
        calls.append(partial(pinned_flash, query[:, :, None], keys, values))
    return variant(given, calls)


def pinned_flash(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(query, keys, values, scale=SCALE, enable_gqa=True)


def quanto(B: int, L: int) -> Variant:
    """A step of transformers' quantised cache: it dequantises all tokens, then runs flash."""
    from transformers.cache_utils import QuantoQuantizedLayer

    layer = QuantoQuantizedLayer(nbits=4, axis_key=0, axis_value=0)
    full = [torch.randn(B, HKV, L, D, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    layer.update(*full)
    del full
    new = [torch.randn(B, HKV, 1, D, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    query = torch.randn(B, HKV * GROUP, 1, D, device="cuda", dtype=torch.bfloat16)
    layer.update(*new)
    recent = layer.keys, layer.values

    def call() -> Tensor:
        layer.keys, layer.values = recent  # every call adds the same token
        return pinned_flash(query, *layer.update(*new))

    return Variant([call], B * HKV * L * D, None)  # its numbers are known to it alone


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
    try:
        variants[QUANTO] = quanto(B, L)
    except (ImportError, RuntimeError) as error:  # not installed, out of memory
        notes[QUANTO] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    right = {
        name: own for name, own in variants.items() if own.error is None or own.error < TOLERANCE
    }
    eager = rounds({name: (every(own.calls), len(own.calls)) for name, own in right.items()})
    graphs = {
        name: (captured(own.calls), len(own.calls)) for name, own in right.items() if name != QUANTO
    }
    graph = eager | rounds(graphs)
    rows: list[dict[str, Any]] = []
    for name in (FLASH, *OURS, QUANTO):
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
    """Every variant of ours at a small size in Triton's interpreter, against float64."""
    rows = []
    for name in OURS:
        given = inputs(2, 1280, name, 1, "cpu", torch.float16)
        found = ours(given, processors=4)
        row = {"batch": 2, "context": 1280, "variant": name, "error": found.error}
        rows.append(row | {"bytes": found.counted})
        print(f"{name:<16} relative error {found.error:.1e}, {found.counted} bytes", flush=True)
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
        print("Triton's interpreter on the CPU: errors only, no times.")
        report |= {"interpreter": True, "rows": interpreted()}
        wrong = [row["variant"] for row in report["rows"] if not row["error"] < TOLERANCE]
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
