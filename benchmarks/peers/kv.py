"""Plans for KV caches beside kvpress and transformers' quantized caches, at equal bytes.

    python benchmarks/peers/kv.py [--profile FILE] [--prompts N] [--minutes M] [--json FILE]

One model, the same held-out prompts, the same bytes; kvpress in a process of its own, because it
patches attention when it is imported.  Peers need `pip install --no-deps kvpress` (0.5.5 asks for
transformers below 5.3, and runs on 5.23 with the tokens' places handed to its hooks), with
cachetools, fire, peft, datasets, requests, pandas and, for caches in few bits, optimum-quanto.

The context is read by the whole cache, compressed once, and the true continuation read after it
("after": questions come later and are not known; "inside": the first question, up to its last
word, stands in the context and its answer is what counts).  Bytes are those of a 16-bit model.
Compression never sees these prompts: plans are solved and refined on the calibration prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cacheplan.environment import environment, installed_versions
from cacheplan.zoo.recall.make_prompts import CONTEXT

sys.path.insert(0, str(Path(__file__).parent))  # also under PYTHONSAFEPATH

from kv_ours import SHOWN, profile_at
from kv_report import damage_lines, fixed_sizes, goals, rows
from kv_worker import Task

BUDGETS = [0.5, 0.3, 0.2, 0.1, 0.05]
PEERS = ("kvpress", "optimum-quanto", "hqq")
ROUNDS, STEPS, TIMED_CONTEXT, TIMED_AT = 3, 24, 1600, 0.2
NOT_RUN = {
    "FastKVzip, KVzap, QFilter, ExpectedAttentionStats": "need trained or measured files per model",
    "RestoreKV": "needs trained adapters",
    "LU-KV's own table": "there is one for Llama-3.1-8B only; ours was put in its place",
    "SimLayerKV, DMS, EntropyGatedChunkKV": "take thresholds, so that bytes are an outcome",
    "ThinK": "zeroes channels and stores them all the same",
    "Finch": "needs a delimiter between context and question",
    "KVCompose, KVgrad": "need prompts registered with their own pipeline, KVgrad also gradients",
}


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        plans = options.plans or Path(folder) / "plans"
        plans.mkdir(parents=True, exist_ok=True)
        profile = options.profile or profile_at(
            Path(folder) / "profile.safetensors", options.model, options.calibration
        )
        task = Task(
            family="kvpress",
            profile=str(profile),
            model=options.model,
            file=_text(options.file),
            calibration=_text(options.calibration),
            prompts=options.prompts,
            context=CONTEXT,
            budgets=options.budgets,
            ours=options.ours,
            without=options.without,
            plans=str(plans),
            minutes=0.65 * options.minutes,  # ours have fewer arms, and as many prompts
        )
        peers = _run(task)
        ours = _run(
            replace(
                task, family="cacheplan", prompts=peers["prompts"], minutes=0.35 * options.minutes
            )
        )
        times = _times(task, options.rounds)
    prompts = min(peers["prompts"], ours["prompts"])
    full = [key for key in peers["scores"] if json.loads(key)[3] == "full"]
    patched = max(score["kl"] for key in full for score in peers["scores"].pop(key))
    scores = {**ours["scores"], **peers["scores"]}
    made = rows(scores, prompts)
    found = {
        **environment(),
        "peers": {name: version for name, version in installed_versions(*PEERS) if name in PEERS},
        "prompts": prompts,
        "model": None if options.model is None else Path(options.model).name,
        "left_out": options.without,
        "kl_of_the_full_cache_under_kvpress": patched,
        "goals": goals(made, scores, prompts),
        "rows": made,
        "decode": times,
        "stepwise_difference": {**ours["stepwise_difference"], **peers["stepwise_difference"]},
        "notes": {**ours["notes"], **peers["notes"]},
        "refused": {**ours["refused"], **peers["refused"]},
        "not_run": NOT_RUN,
    }
    _print(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder or name; the embedded model otherwise")
    parser.add_argument("--file", type=Path, help="held-out prompts of that model")
    parser.add_argument("--calibration", type=Path, help="calibration prompts of that model")
    parser.add_argument("--profile", type=Path, help="measured beforehand on the calibration")
    parser.add_argument("--plans", type=Path, help="folder that keeps solved and refined plans")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--ours", nargs="+", default=list(SHOWN), help="recipes, each also refined")
    parser.add_argument("--without", nargs="+", default=[], help="arms to leave out, by name")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="no prompt begins later"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timing, alternating")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.model and not (options.file and options.calibration):
        parser.error("--model needs its own prompts: give --file and --calibration.")
    return options


def _run(task: Task) -> dict[str, Any]:
    """The answer of one process; its progress goes to this one's standard error."""
    worker = Path(__file__).with_name("kv_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker)],
        input=json.dumps(asdict(task)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _times(task: Task, rounds: int) -> dict[str, Any]:
    """Median milliseconds of a decode step per arm, the families' processes taking turns."""
    seen = dict[str, list[float]]()
    held, family = dict[str, int](), dict[str, str]()
    timing = replace(
        task,
        prompts=1,
        context=TIMED_CONTEXT,
        budgets=[TIMED_AT],
        ours=[name for name in task.ours if not name.endswith("refined")],
        steps=STEPS,
    )
    length = 0
    for _ in range(rounds):
        for kind in ("cacheplan", "kvpress"):
            found = _run(replace(timing, family=kind))
            length = found["context"]
            for arm, (of, seconds, held_bytes) in found["times"].items():
                name = f"{arm} (attention patched)" if kind == "kvpress" and arm == "full" else arm
                seen.setdefault(name, []).append(1000 * seconds)
                held[name], family[name] = held_bytes, of
    return {
        "context": length,
        "budget": TIMED_AT,
        "unit": "ms of the thread's CPU time per token, medians of rounds",
        "arms": {
            name: {
                "of": family[name],
                "ms": statistics.median(times),
                "bytes_after_a_step": held[name],
            }
            for name, times in seen.items()
        },
    }


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _print(found: dict[str, Any]) -> None:
    console = Console(width=170)
    for setting in dict.fromkeys(row["setting"] for row in found["rows"]):
        heads, cells = damage_lines(found["rows"], setting)
        shown = Table(*heads, title=f"question {setting} the context, {found['prompts']} prompts")
        for row in cells:
            shown.add_row(*(text.replace("**", "") for text in row))
        console.print(shown)
        for row in fixed_sizes(found["rows"], setting):
            console.print("all tokens:", *row)
    for goal in found["goals"]:
        low, high = goal["interval"]
        console.print(
            f"{goal['setting']} {goal['budget']:g} by bytes {goal['bytes']}: {goal['ours']} / "
            f"{goal['peer']} = {goal['ratio']:.3g} ({low:.3g} to {high:.3g})"
        )


if __name__ == "__main__":
    main()
