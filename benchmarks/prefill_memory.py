"""Peak memory of a prefill: at once, at once under a plan, and in pieces under a plan.

    python benchmarks/prefill_memory.py [--tokens 16384] [--chunks 1024 256]

A random Llama (8 layers, 4 kv heads of width 64, float32) reads one prompt; each way runs in a
process of its own, whose resident memory is watched.  What counts is the growth over the loaded
model after a short warm-up call.  The full cache's bytes are beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cacheplan.environment import environment

BUDGET = 0.2
LAYERS, KV_HEADS, WIDTH = 8, 4, 64


def measure(tokens: int, way: str) -> dict[str, Any]:
    """Read a prompt in this process."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cacheplan.adapters.language import describe
    from cacheplan.runtime import apply
    from cacheplan.types import (
        Budget,
        Certificate,
        Entry,
        KeyDifference,
        KVAction,
        KVPlan,
        Provenance,
        Site,
        Trigger,
    )

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=131072,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    keeps = BUDGET * np.linspace(0.4, 1.6, KV_HEADS)
    plan = KVPlan(
        model=describe(model, "random llama"),
        recipe="benchmark",
        budget=Budget(asked=str(BUDGET), kept=BUDGET, reached=BUDGET, length=tokens),
        entries=tuple(
            Entry(
                site=Site(layer=layer, head=head),
                action=KVAction(keep=float(keep), scorer=KeyDifference(), recent=32),
            )
            for layer in range(LAYERS)
            for head, keep in enumerate(keeps)
        ),
        trigger=Trigger(),
        certificate=Certificate(solver="none", value=0, bound=None, gap=None, status="benchmark"),
        predicted=None,
        measured=None,
        provenance=Provenance(profile=None, prompts=None, seed=0, versions=(), command=""),
    )
    ids = torch.randint(0, 256, (1, tokens))
    with torch.no_grad():
        model(ids[:, :512], logits_to_keep=1)
        before, started = resident(), time.perf_counter()
        with Watch() as watch:
            if way == "full cache":
                cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
                held = sum(
                    t.untyped_storage().nbytes()
                    for la in cache.layers
                    for t in (la.keys, la.values)
                )
            else:
                chunk = None if way == "planned" else int(way.split()[-1])
                with apply(model, plan, prefill_chunk=chunk) as caches:
                    model(ids, use_cache=True, logits_to_keep=1)
                    held = caches[-1].nbytes
    return {
        "way": way,
        "tokens": tokens,
        "peak_mib": round((watch.most - before) / 2**20, 1),
        "cache_mib": round(held / 2**20, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


class Watch:
    """The most memory that was resident while inside."""

    def __enter__(self) -> Watch:
        self.most, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, resident())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 256])
    parser.add_argument("--way", help=argparse.SUPPRESS)
    out = Path("benchmarks/results/prefill_memory.json")
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.tokens, options.way)))
        return
    rows = []
    ways = ["full cache", "planned", *(f"planned, pieces of {chunk}" for chunk in options.chunks)]
    for way in ways:
        command = [sys.executable, __file__, "--tokens", str(options.tokens), "--way", way]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(found.stdout))
        row = rows[-1]
        print(
            f"{way:28} peak {row['peak_mib']:8.1f} MiB, cache {row['cache_mib']:7.1f} MiB, "
            f"{row['seconds']:6.1f} s"
        )
    record = {"environment": environment(), "budget": BUDGET, "rows": rows}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
