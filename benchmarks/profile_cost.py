"""What profiling costs beside a plain prefill of the same prompt: CPU time and peak memory.

    python benchmarks/profile_cost.py [--tokens 2048]

A random Llama of the proportions of a small real one (width 1024, 4 kv heads of width 64, float32)
reads one text of which an eighth is continuation; so does the embedded model, whose layers are so
narrow that attention is most of its work.  One thread; each way runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from prefill_memory import Watch, resident

from cacheplan.environment import environment

WAYS = ("prefill", "profile for planned", "profile for all recipes")


def measure(name: str, tokens: int, way: str) -> dict[str, Any]:
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from cacheplan.adapters.attention import attending
    from cacheplan.adapters.language import load
    from cacheplan.language import KEEPS
    from cacheplan.profilers.collect import measure as profile
    from cacheplan.profilers.observer import Menu
    from cacheplan.profilers.prompts import Prompt
    from cacheplan.recipes import CANDIDATES, RECIPES

    torch.manual_seed(0)
    torch.set_num_threads(1)
    if name == "recall":
        model, tokens = load(None).model, min(tokens, 1024)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=1024,
                hidden_size=1024,
                intermediate_size=2816,
                num_hidden_layers=8,
                num_attention_heads=16,
                num_key_value_heads=4,
                max_position_embeddings=8192,
                eos_token_id=None,
            )
        ).eval()
    ids = torch.randint(0, model.config.vocab_size, (tokens,)).tolist()
    part = tokens - tokens // 8
    prompt = Prompt(context=ids[:part], continuation=ids[part:])
    menu = Menu(CANDIDATES if "all" in way else RECIPES["planned"].candidates, KEEPS)

    def once() -> None:
        if way == "prefill":
            cache = DynamicCache(config=model.config)
            model.get_decoder()(input_ids=torch.tensor([ids]), past_key_values=cache)
        else:
            with attending(model):
                profile(model, prompt, menu, ())

    with torch.no_grad():
        once()
        before, started = resident(), time.thread_time()
        with Watch() as watch:
            once()
        seconds = time.thread_time() - started
    return {
        "model": name,
        "tokens": tokens,
        "way": way,
        "candidates": 0 if way == "prefill" else len(menu.candidates),
        "seconds": round(seconds, 2),
        "peak_mib": round((watch.most - before) / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/profile_cost.json"))
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case[0], options.tokens, options.case[1])))
        return
    rows: list[dict[str, Any]] = []
    for name in ("recall", "width 1024"):
        for way in WAYS:
            command = [sys.executable, __file__, "--tokens", str(options.tokens)]
            found = subprocess.run(
                [*command, "--case", name, way], check=True, capture_output=True, text=True
            )
            rows.append(json.loads(found.stdout))
            plain = next(r for r in rows if r["model"] == name and r["way"] == "prefill")
            rows[-1]["times_prefill"] = round(rows[-1]["seconds"] / plain["seconds"], 2)
            print(rows[-1], flush=True)
    record = {"environment": environment(), "rows": rows}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
