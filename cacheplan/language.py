"""What the commands do for language models: profile, solve and verify plans for KV caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cacheplan.environment import installed_versions
from cacheplan.errors import InputError, UnsupportedError
from cacheplan.inputs import prompts_for, refuse_calibration
from cacheplan.plans.check import check, check_model, check_runnable
from cacheplan.types import (
    Certificate,
    Damage,
    Knapsack,
    KVAction,
    KVPlan,
    KVProfile,
    ProbeAttention,
    Provenance,
    Solution,
    Trigger,
    TwoClasses,
    needs_rotary,
)

if TYPE_CHECKING:
    from cacheplan.placement import Placement
    from cacheplan.processes import Processes
    from cacheplan.profilers.collect import Progress
    from cacheplan.verification import Verification

KEEPS = (0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
PROBE_KEEP = 0.1
PROBE_SCORERS = ("window_attention", "key_difference", "position", "low_pass_residual")
SOLVED = ("knapsack", "joint", "layers")  # the divisions that `--solver` makes
SPLIT, ABLATE, SOLVER = 0.8, 8, "milp"
EVALUATIONS, REFINING = 8, 16  # plans measured by `refine`, and prompts each is measured on


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
    processes: Processes,
    placement: Placement | None,
    bits: bool,
    recipes: Sequence[str] | None,
) -> KVProfile | None:
    """Measure a language model and write its profile; see `cacheplan.api.profile`."""
    import torch

    from cacheplan.adapters.language import load
    from cacheplan.adapters.probe_tokens import probe_fits
    from cacheplan.adapters.rotary import rotary_known
    from cacheplan.measuring import check_division, measure
    from cacheplan.profilers.collect import collect
    from cacheplan.profilers.prompts import digest
    from cacheplan.profilers.settings import KVSettings
    from cacheplan.recipes import candidates_for, rows_to_measure
    from cacheplan.recipes.bits import demoting, joint_checks, measured_precisions

    rows = rows_to_measure(recipes)
    ablated = ABLATE if ablate is None else ablate
    check_division(shard, ablated, processes)
    loaded = load(model, device=device, dtype=dtype, placement=placement)
    torch.manual_seed(seed)
    share = SPLIT if split is None else split
    texts = prompts_for(loaded, prompts, "calibration", share, limit)
    known = rotary_known(loaded.model)
    longest = max(len(text.context) for text in texts)
    # a model may lay images and a probe behind them into one mask that cannot be told apart
    pictured = any(text.images is not None for text in texts)
    candidates = tuple(
        c
        for c in candidates_for(loaded.spec, rows)
        if (known or not needs_rotary(c.scorer))
        and probe_fits(loaded.model, c.scorer, longest)
        and not (pictured and isinstance(c.scorer, ProbeAttention))
    )
    keys, values = measured_precisions(rows, loaded.spec) if bits else ((), ())
    settings = KVSettings(
        model=loaded.spec,
        keys=keys,
        values=values,
        demoted=demoting(rows, candidates) if bits else (),
        joint=joint_checks(candidates) if bits and keys else (),
        candidates=candidates,
        keeps=KEEPS,
        probes=_probes(candidates),
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
        lambda state, save, report: collect(loaded.model, texts, state, save=save, progress=report),
        processes=processes,
        progress=progress,
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
    from cacheplan.formulate import formulate, predict, reached, realize
    from cacheplan.formulate_bits import chooses_bits, reached_bytes
    from cacheplan.readings import context_length
    from cacheplan.recipes import find_recipe, seeing, while_decoding
    from cacheplan.solvers.classes import Classes
    from cacheplan.solvers.registry import DIVISION, knapsack_solver

    row, solver = seeing(find_recipe(recipe), profile.model), solver or SOLVER
    size = length or context_length(profile)
    if size < 1:
        raise InputError(f"The length is {length} tokens, expected at least 1.")
    asked = parse_budget(budget, profile.model, size)
    every = decode_every if decode_every is not None else row.decode_every
    if every is not None:
        row = while_decoding(replace(row, decode_every=every))
    if chooses_bits(row):
        asked = replace(asked, max_rows=None)  # rows cost too different amounts to be counted
    problem = formulate(profile, row, asked)
    solution: Solution
    if isinstance(problem, Knapsack):
        solution = knapsack_solver(solver)(problem)
    elif isinstance(problem, TwoClasses):
        solution = Classes()(problem)
    else:
        solution = DIVISION[row.allocation](problem)
    entries = realize(profile, row, asked, solution)
    kl = None if row.online else predict(profile, entries)  # known only with the prompt
    plan = KVPlan(
        model=profile.model,
        recipe=row.name,
        budget=replace(asked, reached=reached(profile, entries, every)),
        entries=entries,
        trigger=Trigger(decode_every=every, prefill_chunk=row.prefill_chunk, online=row.online),
        certificate=Certificate(
            solver=solver if row.allocation in SOLVED else row.allocation,
            value=solution.value,
            bound=solution.bound,
            gap=solution.gap,
            status=solution.status,
        ),
        predicted=None
        if kl is None
        else Damage(kl=kl, prompts=profile.prompts, digest=profile.prompts_digest),
        measured=None,
        provenance=Provenance(
            profile=profile.digest,
            prompts=profile.prompts_digest,
            seed=profile.seed,
            versions=installed_versions(),
            command=command,
        ),
    )
    if chooses_bits(row):
        plan = replace(plan, budget=replace(plan.budget, reached=reached_bytes(plan)))
    check(plan)
    check_runnable(plan)
    return plan


def refine_language(
    plan: KVPlan,
    profile: KVProfile,
    *,
    model: str | None,
    prompts: Path | None,
    split: float | None,
    limit: int | None,
    evaluations: int | None,
    minutes: float | None,
    state: Path | None,
    device: str | None,
    dtype: str | None,
    command: str,
    progress: Progress | None,
) -> KVPlan:
    """Weigh heads by what they do under the plan, and solve again; see `cacheplan.api.refine`."""
    from cacheplan.adapters.language import load
    from cacheplan.cache_refinement import refine_cache_plan
    from cacheplan.profilers.prompts import digest
    from cacheplan.recipes import find_recipe

    most = EVALUATIONS if evaluations is None else evaluations
    few = REFINING if limit is None else limit
    for name, value in (("--evaluations", most), ("--limit", few)):
        if value < 1:
            raise InputError(f"{name} is {value}, expected at least 1.")
    if minutes is not None and not minutes > 0:
        raise InputError(f"--minutes is {minutes:g}, expected more than 0.")
    if find_recipe(plan.recipe).allocation != "knapsack" or plan.budget.max_rows is not None:
        raise UnsupportedError(
            f'A plan of recipe "{plan.recipe}" for {plan.budget.asked} does not weigh heads under '
            "a share of the cache: refine one of planned with a budget such as 0.2."
        )
    if plan.provenance.profile != profile.digest:
        raise InputError(
            "The plan was not solved from this profile: give the file that `cacheplan solve` read."
        )
    loaded = load(model or plan.model.id, device=device, dtype=dtype)
    check_model(plan, loaded.spec)
    share = SPLIT if split is None else split
    texts = prompts_for(loaded, prompts, "calibration", share, profile.prompts)
    if digest(texts) != profile.prompts_digest:
        raise InputError(
            "These are not the prompts of the profile: refine on those that `cacheplan profile` "
            "was given, so that no others are used up for verification."
        )
    solver = plan.certificate.solver

    def solve(weighed: KVProfile) -> KVPlan:
        return solve_language(
            weighed,
            budget=plan.budget.asked,
            recipe=plan.recipe,
            solver=solver,
            length=plan.budget.length,
            decode_every=plan.trigger.decode_every,
            command=command,
        )

    refined, before, after = refine_cache_plan(
        loaded.model,
        plan,
        profile,
        texts[:few],
        solve,
        evaluations=most,
        minutes=minutes,
        state=state,
        progress=progress,
    )
    status = f"refined on {len(texts[:few])} prompts: KL {before:.4g} -> {after:.4g}"
    return replace(
        refined,
        certificate=replace(refined.certificate, status=status),
        measured=None,
        provenance=replace(refined.provenance, versions=installed_versions(), command=command),
    )


def verify_language(
    plans: Sequence[KVPlan],
    *,
    model: str | None,
    prompts: Path | None,
    split: float | None,
    limit: int | None,
    device: str | None,
    dtype: str | None,
    progress: Progress | None,
    placement: Placement | None,
) -> list[Verification]:
    """Measure KV plans of one model on held-out prompts; see `cacheplan.api.verify`."""
    from cacheplan.adapters.language import load
    from cacheplan.profilers.prompts import digest
    from cacheplan.verification import measure_plans

    first = plans[0].model
    loaded = load(model or first.id, device=device, dtype=dtype, placement=placement)
    for plan in plans:
        check_model(plan, loaded.spec)
    share = SPLIT if split is None else split
    texts = prompts_for(loaded, prompts, "heldout", share, limit)
    for plan in plans:
        refuse_calibration(digest(texts), plan.provenance)
    return measure_plans(loaded.model, plans, texts, progress=progress)


def _probes(candidates: tuple[KVAction, ...]) -> tuple[tuple[int, int], ...]:
    """The ablations that calibrate sensitivity: one aggressive option of each kind of scorer."""
    from cacheplan.recipes import RECIPES

    keep = KEEPS.index(PROBE_KEEP)
    menu = RECIPES["planned"].candidates
    found = []
    for name in PROBE_SCORERS:
        last = [c for c in menu if c.scorer.name == name][-1]
        found.append((candidates.index(last), keep))
    return tuple(found)
