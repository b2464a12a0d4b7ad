"""What the command line does, as functions: profile, merge, solve, verify, generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cacheplan.environment import installed_versions
from cacheplan.errors import InputError
from cacheplan.generation import Generation, generate
from cacheplan.inputs import prompts_for
from cacheplan.plans.check import check, check_model, check_runnable, kv_only
from cacheplan.plans.io import read_plan as load_plan
from cacheplan.plans.io import write_plan as save_plan
from cacheplan.types import (
    Certificate,
    Damage,
    Knapsack,
    KVPlan,
    KVProfile,
    Plan,
    Provenance,
    Solution,
    Trigger,
)

if TYPE_CHECKING:
    from cacheplan.profilers.collect import Progress
    from cacheplan.verification import Verification

__all__ = [
    "Generation",
    "generate",
    "load_plan",
    "load_profile",
    "merge",
    "profile",
    "save_plan",
    "solve",
    "verify",
]

KEEPS = (0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
PROBE_KEEP = 0.1
PROBE_SCORERS = ("window_attention", "key_difference", "position")


def profile(
    model: str | None = None,
    *,
    out: Path,
    prompts: Path | None = None,
    split: float = 0.8,
    limit: int | None = None,
    ablate: int = 8,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> KVProfile | None:
    """Measure a model on calibration prompts and write the profile to `out`.

    A run that was interrupted goes on where it stopped (`out` with the suffix `.part`).  With
    `shard=(i, n)`, only every n-th prompt from the i-th is measured; `merge` joins the files,
    and None is returned.
    """
    import torch

    from cacheplan.adapters.language import load
    from cacheplan.profilers.collect import collect
    from cacheplan.profilers.prompts import digest
    from cacheplan.profilers.store import (
        ProfileState,
        Settings,
        finish,
        read_state,
        write_state,
    )
    from cacheplan.recipes import CANDIDATES

    part, parts = shard
    if not 0 <= part < parts:
        raise InputError(
            f'The shard is "{part}/{parts}", expected i/n with i from 0 to n - 1, such as 0/2.'
        )
    if ablate < 1:
        raise InputError(f"--ablate is {ablate}, expected at least 1 prompt to ablate heads on.")
    loaded = load(model, device=device, dtype=dtype)
    torch.manual_seed(seed)
    texts = prompts_for(loaded, prompts, "calibration", split, limit)
    settings = Settings(
        model=loaded.spec,
        candidates=CANDIDATES,
        keeps=KEEPS,
        probes=_probes(),
        ablate=min(ablate, len(texts)),
        prompts=len(texts),
        prompts_digest=digest(texts),
        seed=seed,
        versions=installed_versions(),
    )
    state = ProfileState(settings, range(part, len(texts), parts))
    unfinished = out.with_name(out.name + ".part")
    if unfinished.exists():
        earlier = read_state(unfinished)
        if earlier.settings != settings or not earlier.done <= set(state.responsible):
            raise InputError(
                f"{unfinished} is an interrupted profile with other settings: delete it, or "
                "choose another --out."
            )
        state.done, state.sums = earlier.done, earlier.sums
    write_state(state, unfinished)  # an output that cannot be written is noticed before the work
    collect(
        loaded.model,
        texts,
        state,
        save=lambda current: write_state(current, unfinished),
        progress=progress,
    )
    write_state(state, out)
    unfinished.unlink(missing_ok=True)
    return finish(state, str(out)) if parts == 1 else None


def merge(parts: Sequence[Path], *, out: Path) -> KVProfile:
    """Join the shards of one profile; the result has the bytes of an undivided run."""
    from cacheplan.profilers.store import finish, read_state, write_state
    from cacheplan.profilers.store import merge as merge_states

    if not parts:
        raise InputError("No shards were given: name the files that `profile --shard` wrote.")
    merged = merge_states([read_state(p) for p in parts], [str(p) for p in parts])
    profile = finish(merged, "The merged profile")
    write_state(merged, out)
    return profile


def load_profile(path: Path) -> KVProfile:
    """Read a complete profile."""
    from cacheplan.profilers.store import finish, read_state

    return finish(read_state(path), str(path))


def solve(
    profile: KVProfile,
    *,
    budget: str | float,
    recipe: str = "planned",
    solver: str = "milp",
    length: int | None = None,
    decode_every: int | None = None,
    command: str = "",
) -> KVPlan:
    """Choose what every site keeps under the budget.

    `length` is the prompt length for which absolute budgets ("512tok", "2GiB") are translated;
    the profile's mean context length if None.  `solver` applies to the knapsack of `planned`.
    """
    from cacheplan.budget import parse_budget
    from cacheplan.formulate import formulate, predict, reached, realize, statistic
    from cacheplan.recipes import find_recipe, while_decoding
    from cacheplan.solvers.prefix import Prefix
    from cacheplan.solvers.registry import knapsack_solver
    from cacheplan.solvers.uniform import Uniform

    row = find_recipe(recipe)
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


def verify(
    plan: Plan,
    *,
    model: str | None = None,
    prompts: Path | None = None,
    split: float = 0.8,
    limit: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Measure the plan's damage on held-out prompts (for the embedded model: its own).

    Raises InputError if the prompts are those the plan was calibrated on.
    """
    from cacheplan.adapters.language import load
    from cacheplan.profilers.prompts import digest
    from cacheplan.verification import measure_damage

    plan = kv_only(plan, "verify")
    loaded = load(model or plan.model.id, device=device, dtype=dtype)
    check_model(plan, loaded.spec)
    texts = prompts_for(loaded, prompts, "heldout", split, limit)
    if digest(texts) == plan.provenance.prompts:
        raise InputError(
            "These are the prompts the plan was calibrated on: verify on others, or the damage "
            "looks smaller than it is."
        )
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
