"""One process of the comparison: its arms on every prompt, or the time of their decode steps.

`kv.py` starts it: standard input is a JSON object of the fields of `Task`, standard output
ends with one line, the JSON of what was found.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # also under PYTHONSAFEPATH

from kv_measure import Arm, Score, full_logits, measure, stepwise_difference, timed
from kv_ours import full_arm, our_arms, shares
from kv_prompts import asked_inside, prompts_of
from kv_quantized import quantized_arms
from kv_replay import Contexts

from cacheplan import api
from cacheplan.adapters.language import LanguageModel, load
from cacheplan.profilers.prompts import Prompt
from cacheplan.types import KVProfile

STEPPED = 8  # prompts on which bytes are counted after one more token: a call of its own
CHECKED, CHECKED_AT = 8, 0.2  # steps and budget of the check that many tokens may follow at once
SETTINGS: dict[str, Callable[[Prompt], Prompt | None]] = {
    "after": lambda prompt: prompt,
    "inside": asked_inside,
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to run: `family` "cacheplan" (with transformers' own) or "kvpress".

    Without `steps` the damage on `prompts` prompts, as many as begin within `minutes`; with it the
    time of so many decode steps, at the first of `budgets`, after a context of `context` tokens.
    """

    family: str
    profile: str
    model: str | None
    file: str | None
    calibration: str | None
    prompts: int
    context: int
    budgets: list[float]
    ours: list[str]
    without: list[str]
    plans: str
    minutes: float
    steps: int = 0


def main() -> None:
    task = Task(**json.load(sys.stdin))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loaded = load(task.model)
    profile = api.load_profile(Path(task.profile))
    assert isinstance(profile, KVProfile)
    refused = dict[str, str]()
    arms = [
        (budget, arm)
        for budget, arm in _arms(task, profile, loaded, refused)
        if arm.name not in task.without
    ]
    prompts = prompts_of(
        Path(task.file) if task.file else None, loaded.tokenizer, task.prompts, task.context
    )
    if task.steps:
        found = _time(task, loaded.model, arms, prompts[0], refused)
    else:
        found = _measure(task, loaded.model, arms, prompts, refused)
    print(json.dumps({**found, "refused": refused}))


def _arms(
    task: Task, profile: KVProfile, loaded: LanguageModel, refused: dict[str, str]
) -> Iterator[tuple[float | None, Arm]]:
    """Arms with their budgets, None for those that have no choice."""
    texts_file = None if task.calibration is None else Path(task.calibration)
    if task.family == "cacheplan":
        yield None, full_arm()
        for arm in quantized_arms():
            yield None, arm
        contexts, plans = Contexts(loaded.model.model), Path(task.plans)
        for budget in task.budgets:
            arms, reasons = our_arms(
                profile, budget, task.ours, task.model, texts_file, plans, contexts
            )
            refused.update({f"{name} at {budget:g}": why for name, why in reasons.items()})
            yield from ((budget, arm) for arm in arms)
    else:
        from kv_kvpress import peer_arms

        texts = [
            loaded.tokenizer.decode(prompt.context, skip_special_tokens=True)
            for prompt in calibration(texts_file, loaded.tokenizer, profile.prompts)
        ]
        yield None, full_arm()  # the patched attention without a press must change nothing
        for budget in task.budgets:
            plan = api.solve(profile, budget=budget, recipe="planned")
            for arm in peer_arms(budget, partial(shares, plan), texts):
                yield budget, arm


def calibration(file: Path | None, tokenizer: Any, number: int) -> list[Prompt]:
    from cacheplan.zoo import embedded_prompts

    return prompts_of(file or embedded_prompts("recall", "calibration"), tokenizer, number)


def _measure(
    task: Task,
    model: Any,
    arms: list[tuple[float | None, Arm]],
    prompts: list[Prompt],
    refused: dict[str, str],
) -> dict[str, Any]:
    scores = dict[str, list[Score]]()
    differences = dict[str, float]()
    started, done = time.monotonic(), 0
    for number, prompt in enumerate(prompts):
        if time.monotonic() - started > 60 * task.minutes:
            break
        for setting, variant in SETTINGS.items():
            seen = variant(prompt)
            if seen is None:
                continue
            reference = full_logits(model, seen)
            for budget, arm in list(arms):
                key = json.dumps([setting, budget, arm.family, arm.name])
                try:
                    score = measure(model, arm, seen, reference, stepped=number < STEPPED)
                    if number == 0 and setting == "after" and budget in (CHECKED_AT, None):
                        differences[arm.name] = stepwise_difference(model, arm, seen, CHECKED)
                except Exception as error:  # a peer's own: the arm is left out and the reason kept
                    model.set_attn_implementation("sdpa")
                    arms.remove((budget, arm))
                    refused[f"{arm.name} at {budget}"] = f"{type(error).__name__}: {error}"
                    continue
                scores.setdefault(key, []).append(score)
        done = number + 1
        print(f"{task.family}: {done}/{len(prompts)} prompts", file=sys.stderr, flush=True)
    return {
        "prompts": done,
        "scores": {key: [asdict(score) for score in found] for key, found in scores.items()},
        "notes": {arm.name: arm.note for _, arm in arms if arm.note},
        "stepwise_difference": differences,
    }


def _time(
    task: Task,
    model: Any,
    arms: list[tuple[float | None, Arm]],
    prompt: Prompt,
    refused: dict[str, str],
) -> dict[str, Any]:
    found = dict[str, tuple[str, float, int]]()
    for budget, arm in arms:
        if budget not in (None, task.budgets[0]):
            continue
        try:
            found[arm.name] = (arm.family, *timed(model, arm, prompt, task.steps))
        except Exception as error:  # as above
            model.set_attn_implementation("sdpa")
            refused[f"{arm.name} at {budget}"] = f"{type(error).__name__}: {error}"
    return {"times": found, "context": len(prompt.context)}


if __name__ == "__main__":
    main()
