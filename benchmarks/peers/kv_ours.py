"""Our arms: plans solved from one profile, refined or not, and the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kv_measure import Arm, Held
from kv_replay import Contexts
from torch import Tensor
from transformers import DynamicCache

from cacheplan import api
from cacheplan.errors import CacheplanError
from cacheplan.plans.io import read_plan, write_plan
from cacheplan.plans.rows import kept_rows
from cacheplan.recipes import find_recipe
from cacheplan.runtime.cache import PlanCache
from cacheplan.runtime.language import following as follow
from cacheplan.types import KVPlan, KVProfile

REFINED = " refined"  # the ending of arms whose plan is refined on the calibration prompts
# the published methods that kvpress has as well, and those that were best in benchmarks/recipes.py
SHOWN = (
    "planned",
    f"planned{REFINED}",
    "joint",
    "snapkv",
    "keydiff",
    "adakv",
    "h2o",
    "kvzip",
)
EVALUATIONS, REFINED_ON = 4, 12  # plans tried, each on so many calibration prompts
STEPS = 16  # tokens read at a time where a plan evicts at every token: one by one takes too long


def our_arms(
    profile: KVProfile,
    budget: float,
    names: Sequence[str],
    model: str | None,
    calibration: Path | None,
    plans: Path,
    contexts: Contexts,
) -> tuple[list[Arm], dict[str, str]]:
    """One arm per recipe, some also refined; and why the others do not run.

    Plans are kept in the folder `plans`, as refining takes minutes.  The arms read their prompts
    from `contexts`, which are of the measured model.
    """
    arms, refused = list[Arm](), dict[str, str]()
    for name in names:
        file = plans / f"{name.replace(' ', '_')}-{budget:g}.json"
        try:
            plan = read_plan(file) if file.exists() else None
            if not isinstance(plan, KVPlan) or plan.provenance.profile != profile.digest:
                plan = _solved(profile, budget, name, model, calibration)
                write_plan(plan, file)
        except CacheplanError as error:
            refused[name] = str(error)
            continue
        arms.append(planned_arm(name, plan, contexts))
    return arms, refused


def _solved(
    profile: KVProfile, budget: float, name: str, model: str | None, calibration: Path | None
) -> KVPlan:
    recipe = name.removesuffix(REFINED)
    every = STEPS if find_recipe(recipe).decode_every else None
    plan = api.solve(profile, budget=budget, recipe=recipe, decode_every=every)
    if name.endswith(REFINED):
        plan = api.refine(
            plan,
            profile,
            model=model,
            prompts=calibration,
            evaluations=EVALUATIONS,
            limit=REFINED_ON,
        )
    return plan


def full_arm() -> Arm:
    """The stock cache: what kl 0 and 100 % of the bytes are."""

    def read(model: Any, ids: Tensor) -> Held:
        cache = DynamicCache(config=model.config)
        model.model(input_ids=ids, past_key_values=cache)
        return Held(cache)

    return Arm("full", "transformers", read)


def shares(plan: KVPlan, length: int) -> list[list[int]]:
    """Tokens that a plan keeps of a context, `[layers][kv heads]`, for peers to follow."""
    found: list[list[int]] = kept_rows(plan, length).tolist()
    return found


def profile_at(out: Path, model: str | None, calibration: Path | None) -> Path:
    """Profile the model into the file `out`; without a model the embedded one, on its prompts."""
    torch.manual_seed(0)
    api.profile(model, out=out, prompts=calibration)
    return out


def planned_arm(name: str, plan: KVPlan, contexts: Contexts) -> Arm:
    """A plan that the model follows, which reads prompts from `contexts`."""

    def read(model: Any, ids: Tensor) -> Held:
        cache = PlanCache(plan, model)
        if plan.trigger.prefill_chunk:  # its pieces see what earlier evictions have left
            model.model(input_ids=ids, past_key_values=cache)
        else:
            contexts.read(cache, ids)
        return Held(cache)

    every = plan.trigger.decode_every
    note = f"evicts after every {every} new tokens" if every else ""
    return Arm(
        name,
        "cacheplan",
        read,
        following=lambda model: follow(model, plan),
        every=every,
        note=note,
    )
