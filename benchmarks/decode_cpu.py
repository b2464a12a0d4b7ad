"""Decode attention on a CPU: planned caches against the full one, alternating in one run.

    python benchmarks/decode_cpu.py [--contexts 4096 16384 32768] [--rounds 30]

Shapes are those of Llama-3.1-8B: 32 query heads on 8 kv heads of width 128, bfloat16, one text,
one thread.  The baseline ("full") is the fastest SDPA call we know over the whole cache: queries of
a group folded into the query length, and no token appended.  "transformers" is its own SDPA call,
"transformers, update" with the copy of the cache that its `update` makes at every token.  A planned
step is all that the runtime does in a layer: append the token in place and attend to every head's
own row.
Heads keep between 0.4 and 1.6 times the mean, as solved plans do.  Several layers take turns, so
that no cache stays in the processor's own.  Times are CPU time of the thread, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cacheplan.adapters.attention import Step as Attention
from cacheplan.environment import environment
from cacheplan.kernels.ragged_attention.naive import ragged_attention
from cacheplan.runtime.attending import attend
from cacheplan.runtime.rows import RaggedRows
from cacheplan.runtime.tiers import TieredRows
from cacheplan.types import KVAction, Precision

QUERY_HEADS, KV_HEADS, WIDTH, LAYERS = 32, 8, 128, 4
BUDGETS = (0.5, 0.2, 0.1)
SHARES = np.linspace(0.4, 1.6, KV_HEADS)  # of the mean, head by head
INT8 = KVAction(
    keep=1.0,
    key=Precision(format="int", bits=8, axis="token"),
    value=Precision(format="int", bits=8, axis="channel", group=256),
)
MODULE: Any = SimpleNamespace(num_key_value_groups=QUERY_HEADS // KV_HEADS, is_causal=True)
Step = Callable[[int], Any]


def random(heads: int, tokens: int) -> torch.Tensor:
    return torch.randn(1, heads, tokens, WIDTH, dtype=torch.bfloat16)


def full(context: int, *, own: bool = False, update: bool = False) -> Step:
    layers = [DynamicLayer() for _ in range(LAYERS)]
    for layer in layers:
        layer.update(random(KV_HEADS, context), random(KV_HEADS, context))
    query, new = random(QUERY_HEADS, 1), random(KV_HEADS, 1)
    folded = query.view(1, KV_HEADS, -1, WIDTH)

    def fold(turn: int) -> Any:
        layer = layers[turn % LAYERS]
        return torch.nn.functional.scaled_dot_product_attention(folded, layer.keys, layer.values)

    def step(turn: int) -> Any:
        layer = layers[turn % LAYERS]
        if update:
            layer.update(new, new)
        return sdpa_attention_forward(MODULE, query, layer.keys, layer.values, None)

    return fold if own else step


def planned(context: int, budget: float, *, per_head: bool) -> Step:
    keeps = budget * (SHARES if per_head else np.ones(KV_HEADS))
    layers = []
    for _ in range(LAYERS):
        rows = RaggedRows(random(KV_HEADS, context), random(KV_HEADS, context))
        rows.keep([torch.randperm(context)[: int(keep * context)].sort().values for keep in keeps])
        layers.append(rows)
    query, new = random(QUERY_HEADS, 1), random(KV_HEADS, 1)

    def step(turn: int) -> Any:
        rows = layers[turn % LAYERS]
        rows.append(new, new)
        return ragged_attention(
            query,
            rows.keys,
            rows.values,
            offsets=rows.offsets,
            lengths=rows.lengths,
            scale=WIDTH**-0.5,
        ).transpose(1, 2)

    return step


def int8(context: int, budget: float) -> Step:
    """The same rows with all but the newest tokens in int8, read by torch's product for CPUs."""
    layers = []
    for _ in range(LAYERS):
        rows = RaggedRows(random(KV_HEADS, context), random(KV_HEADS, context))
        counts = [int(keep * context) for keep in budget * SHARES]
        kept = [torch.randperm(context)[:count].sort().values for count in counts]
        layers.append(TieredRows(rows, INT8, kept))
    query, new = random(QUERY_HEADS, 1), random(KV_HEADS, 1)

    def step(turn: int) -> Any:
        rows = layers[turn % LAYERS]
        rows.append(new, new)
        return attend(rows, Attention(MODULE, query, WIDTH**-0.5))

    return step


def measure(context: int, rounds: int) -> dict[str, list[float]]:
    steps: dict[str, Step] = {
        "full": full(context, own=True),
        "transformers": full(context),
        "transformers, update": full(context, update=True),
    }
    for budget in BUDGETS:
        steps[f"{budget} per layer"] = planned(context, budget, per_head=False)
        steps[f"{budget} per head"] = planned(context, budget, per_head=True)
        steps[f"{budget} per head, int8"] = int8(context, budget)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + LAYERS):
        for name, step in steps.items():
            started = time.thread_time()
            step(turn)
            if turn >= LAYERS:  # each layer's first step allocates
                times[name].append(1000 * (time.thread_time() - started))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode_cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for context in options.contexts:
            times = measure(context, options.rounds)
            middle = {name: statistics.median(some) for name, some in times.items()}
            for cache, some in times.items():
                low, high = np.percentile(some, [25, 75])
                rows.append(
                    {
                        "context": context,
                        "cache": cache,
                        "ms": round(middle[cache], 4),
                        "quartiles": [round(float(low), 4), round(float(high), 4)],
                        "speedup": round(middle["full"] / middle[cache], 2),
                    }
                )
    record = {"environment": environment(), "threads": 1, "rounds": options.rounds, "rows": rows}
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    found = {(row["cache"], row["context"]): row for row in rows}
    print(f"{'ms per layer and token':24}" + "".join(f"{c:>18}" for c in options.contexts))
    found = {(row["cache"], row["context"]): row for row in rows}
    for name in dict.fromkeys(row["cache"] for row in rows):
        cells = [found[name, context] for context in options.contexts]
        line = "".join(f"{c['ms']:>10.2f} ({c['speedup']:>4.1f}x)" for c in cells)
        print(f"{name:24}{line}")


if __name__ == "__main__":
    main()
