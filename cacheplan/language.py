"""What the commands do for language models: profile, solve and verify plans for KV caches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cacheplan.environment import installed_versions
from cacheplan.errors import InputError
from cacheplan.inputs import prompts_for, refuse_calibration
from cacheplan.plans.check import check, check_model, check_runnable
from cacheplan.types import (
    Certificate,
    Damage,
    Knapsack,
    KVPlan,
    KVProfile,
    Provenance,
    Solution,
    Trigger,
)

if TYPE_CHECKING:
    from cacheplan.profilers.collect import Progress
    from cacheplan.verification import Verification

KEEPS = (0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
PROBE_KEEP = 0.1
PROBE_SCORERS = ("window_attention", "key_difference", "position")
SPLIT, ABLATE, SOLVER = 0.8, 8, "milp"


def profile_language(
    model: str | None,
    *,
    out: Path,
    prompts: Path | None,
    split: float | None,
    limit: int | None,
    ablate: int | None,
    seed: int,
    shard: tuple[int, int],
    device: str | None,
    dtype: str | None,
    progress: Progress | None,
) -> KVProfile | None:
    """Measure a language model and write its profile; see `cacheplan.api.profile`."""
    import torch

    from cacheplan.adapters.language import load
    from cacheplan.measuring import check_division, measure
    from cacheplan.profilers.collect import collect
    from cacheplan.profilers.prompts import digest
    from cacheplan.profilers.settings import KVSettings
    from cacheplan.recipes import CANDIDATES

    ablated = ABLATE if ablate is None else ablate
    check_division(shard, ablated)
    loaded = load(model, device=device, dtype=dtype)
    torch.manual_seed(seed)
    share = SPLIT if split is None else split
    texts = prompts_for(loaded, prompts, "calibration", share, limit)
    settings = KVSettings(
        model=loaded.spec,
        candidates=CANDIDATES,
        keeps=KEEPS,
        probes=_probes(),
        ablate=min(ablated, len(texts)),
        prompts=len(texts),
        prompts_digest=digest(texts),
        seed=seed,
        versions=installed_versions(),
    )
    found = measure(
        settings,
        shard,
        out,
        lambda state, save: collect(loaded.model, texts, state, save=save, progress=progress),
    )
    assert found is None or isinstance(found, KVProfile)
    return found


def solve_language(
    profile: KVProfile,
    *,
    budget: str | float,
    recipe: str,
    solver: str | None,
    length: int | None,
    decode_every: int | None,
    command: str,
) -> KVPlan:
    """Choose what every head keeps under the budget; see `cacheplan.api.solve`."""
    from cacheplan.budget import parse_budget
    from cacheplan.formulate import formulate, predict, reached, realize, statistic
    from cacheplan.recipes import find_recipe, while_decoding
    from cacheplan.solvers.prefix import Prefix
    from cacheplan.solvers.registry import knapsack_solver
    from cacheplan.solvers.uniform import Uniform

    row, solver = find_recipe(recipe), solver or SOLVER
    size = length or round(float(statistic(profile, "context_length")))
    if size < 1:
        raise InputError(f"The length is {length} tokens, expected at least 1.")
    asked = parse_budget(budget, profile.model, size)
    every = decode_every if decode_every is not None else row.decode_every
    if every is not None:
        row = while_decoding(replace(row, decode_every=every))
    problem = formulate(profile, row, asked)
    solution: Solution
    if isinstance(problem, Knapsack):
        solution = knapsack_solver(solver)(problem)
    else:
        solution = (Prefix() if row.allocation == "prefix" else Uniform())(problem)
    entries = realize(profile, row, asked, solution)
    plan = KVPlan(
        model=profile.model,
        recipe=row.name,
        budget=replace(asked, reached=reached(profile, entries, every)),
        entries=entries,
        trigger=Trigger(decode_every=every),
        certificate=Certificate(
            solver=solver if row.allocation == "knapsack" else row.allocation,
            value=solution.value,
            bound=solution.bound,
            gap=solution.gap,
            status=solution.status,
        ),
        predicted=Damage(
            kl=predict(profile, entries), prompts=profile.prompts, digest=profile.prompts_digest
        ),
        measured=None,
        provenance=Provenance(
            profile=profile.digest,
            prompts=profile.prompts_digest,
            seed=profile.seed,
            versions=installed_versions(),
            command=command,
        ),
    )
    check(plan)
    check_runnable(plan)
    return plan


def verify_language(
    plan: KVPlan,
    *,
    model: str | None,
    prompts: Path | None,
    split: float | None,
    limit: int | None,
    device: str | None,
    dtype: str | None,
    progress: Progress | None,
) -> Verification:
    """Measure a KV plan on held-out prompts; see `cacheplan.api.verify`."""
    from cacheplan.adapters.language import load
    from cacheplan.profilers.prompts import digest
    from cacheplan.verification import measure_damage

    loaded = load(model or plan.model.id, device=device, dtype=dtype)
    check_model(plan, loaded.spec)
    share = SPLIT if split is None else split
    texts = prompts_for(loaded, prompts, "heldout", share, limit)
    refuse_calibration(digest(texts), plan.provenance)
    return measure_damage(loaded.model, plan, texts, progress=progress)


def _probes() -> tuple[tuple[int, int], ...]:
    """The ablations that calibrate sensitivity: one aggressive option of each kind of scorer."""
    from cacheplan.recipes import CANDIDATES, RECIPES

    keep = KEEPS.index(PROBE_KEEP)
    menu = RECIPES["planned"].candidates
    found = []
    for name in PROBE_SCORERS:
        last = [c for c in menu if c.scorer.name == name][-1]
        found.append((CANDIDATES.index(last), keep))
    return tuple(found)
