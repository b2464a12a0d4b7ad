"""Graph breaks, and time against FLOPs, of plans and of diffusers' own cache hooks.

    python benchmarks/compiling.py --plan plan.json [--json FILE] [--repeat N]

One model, one run: the embedded pipeline without a plan, under a plan that skips nothing, under
the given plan, and under diffusers' FirstBlockCache and TaylorSeerCache.  Times are eager medians
of whole runs; graph breaks are torch's own count, with the transformer compiled as a whole
(`torch.compile(transformer)`) and by its repeated blocks (`compile_repeated_blocks`), by a
backend that only traces.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters

import cacheplan
from cacheplan.adapters.denoiser import load
from cacheplan.adapters.flops import flop_counter
from cacheplan.adapters.loop import Loop, watching
from cacheplan.adapters.sampling import run_pipeline
from cacheplan.environment import environment
from cacheplan.types import FeaturePlan
from cacheplan.zoo import EMBEDDED_DIFFUSION_MODEL, embedded_call

PROMPTS = ["two striped red stars on white"] * 4
Arm = Callable[[Any], AbstractContextManager[Any]]


def arms(plan: FeaturePlan) -> dict[str, Arm]:
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
    from diffusers.hooks import apply_first_block_cache, apply_taylorseer_cache

    parts = [r"transformer_blocks\.\d+\.(attn1|attn2|ff)"]
    taylor = TaylorSeerCacheConfig(
        cache_interval=2, max_order=1, cache_identifiers=parts, taylor_factors_dtype=torch.float32
    )
    null = replace(plan, entries=(), gate=None, dt_scale=())
    return {
        "no plan": lambda pipe: nullcontext(),
        "null plan": lambda pipe: cacheplan.apply(pipe, null),
        "plan": lambda pipe: cacheplan.apply(pipe, plan),
        "diffusers FirstBlockCache": lambda pipe: _hooked(
            pipe, lambda m: apply_first_block_cache(m, FirstBlockCacheConfig(threshold=0.1))
        ),
        "diffusers TaylorSeerCache": lambda pipe: _hooked(
            pipe, lambda m: apply_taylorseer_cache(m, taylor)
        ),
    }


@contextmanager
def _hooked(pipe: Any, install: Callable[[Any], None]) -> Iterator[None]:
    """Diffusers' hooks with the cache context that this pipeline does not set itself."""
    from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context

    module = pipe.transformer
    install(module)

    def fresh(loop: Loop) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.reset_stateful_hooks(recurse=True)
        _set_cache_context(module, CacheContext("cond_uncond"))

    with watching(pipe, on_start=fresh):
        yield


def measure(call: dict[str, Any], arm: Arm, repeat: int) -> dict[str, Any]:
    """Each way of compiling gets a pipeline of its own: hooks and compiled code do not come off."""
    pipe = load(None)
    flops: list[int] = []

    def on_call(loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with flop_counter() as counter:
            output = inner(*args, **kwargs)
        flops.append(counter.get_total_flops())
        return output

    arguments = {**call, "prompt": PROMPTS}
    with arm(pipe):
        with watching(pipe, on_call=on_call):
            run_pipeline(pipe, arguments, seed=0)
        seconds = []
        for _ in range(repeat):
            started = time.perf_counter()
            run_pipeline(pipe, arguments, seed=0)
            seconds.append(time.perf_counter() - started)
    return {
        "flops": sum(flops),
        "seconds": statistics.median(seconds),
        "whole": _traced(arguments, arm, _whole),
        "blocks": _traced(arguments, arm, _blocks),
    }


def _whole(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")


def _blocks(pipe: Any) -> None:
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")


def _traced(arguments: dict[str, Any], arm: Arm, compile_: Callable[[Any], None]) -> Any:
    """Graph breaks and graphs of one run, or the error that ended it."""
    torch._dynamo.reset()
    counters.clear()
    pipe = load(None)
    compile_(pipe)
    try:
        with warnings.catch_warnings(), arm(pipe):
            warnings.simplefilter("ignore")
            run_pipeline(pipe, arguments, seed=0)
    except Exception as error:  # a peer's failure is a result
        return {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
    breaks = sum(counters["graph_break"].values())
    return {"graph_breaks": breaks, "graphs": counters["stats"]["unique_graphs"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    plan = cacheplan.load_plan(arguments.plan)
    assert isinstance(plan, FeaturePlan)
    call = embedded_call(EMBEDDED_DIFFUSION_MODEL)
    rows = {name: measure(call, arm, arguments.repeat) for name, arm in arms(plan).items()}
    base = rows["no plan"]
    shown = Table("", "FLOPs", "time", "time / FLOPs", "whole", "blocks")
    for name, row in rows.items():
        row["compute"] = row["flops"] / base["flops"]
        row["time"] = row["seconds"] / base["seconds"]
        words = [_words(row[kind]) for kind in ("whole", "blocks")]
        ratio = f"{row['time'] / row['compute']:.2f}"
        shown.add_row(name, f"{row['compute']:.3f}", f"{row['time']:.3f}", ratio, *words)
    Console().print(shown)
    if arguments.json:
        found = {**environment(), "rows": [{"arm": name, **row} for name, row in rows.items()]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def _words(found: dict[str, Any]) -> str:
    if "error" in found:
        return str(found["error"])[:40]
    return f"{found['graph_breaks']} breaks, {found['graphs']} graphs"


if __name__ == "__main__":
    main()
