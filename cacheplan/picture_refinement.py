"""Improve a feature plan by what it really does: try schedules near it on calibration prompts.

A plan is made from statistics of full runs.  Under the plan features drift, and errors of one step
meet those of another; only a run shows what that does to the final latent.  So computed steps are
moved one at a time, everything else is fitted anew by the planner's own code, and a schedule that
measures better than the best so far takes its place.  Then the weights of its forecasts are fitted
to the final latents themselves.

Prompts are few and changes are many, so what helps one half of the prompts must help the other
half as well: a plan counts by that half on which it gains less.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cacheplan.adapters.sampling import run_pipeline
from cacheplan.atomic import atomic_write
from cacheplan.errors import InputError, PlanError
from cacheplan.formulate_features import plan_for, searched
from cacheplan.picture_weights import directions, fit_weights
from cacheplan.plans.check import check
from cacheplan.plans.codec import decode, encode
from cacheplan.plans.io import dumps
from cacheplan.profilers.collect import Progress
from cacheplan.profilers.feature_ablation import relative_square
from cacheplan.profilers.feature_prompts import PicturePrompt, digest
from cacheplan.runtime.features.apply import apply_features
from cacheplan.solvers.local_search import improve
from cacheplan.types import (
    Certificate,
    FeatureDamage,
    FeaturePlan,
    FeatureProfile,
    FeatureRecipe,
    FeatureSite,
)

Mask = NDArray[np.bool_]
WORTH = 0.01  # a schedule must measure better by this share: prompts are few
LOST = 1e6  # error of a run that ends in NaN
_LEAST = 1e-12
Rows = Sequence[frozenset[FeatureSite]]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One schedule that was run: "1" where a row computes, rows divided by "/".

    Errors are those of the prompts in the order in which they were run, up to the one with which
    the schedule could no longer win.
    """

    steps: str
    errors: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Trials:
    """What an interrupted refinement leaves behind; digests say to which search it belongs."""

    plan: str
    profile: str
    prompts: str
    tried: tuple[Tried, ...] = ()


class _OutOfTime(Exception):  # noqa: N818 - ends the search, and is no error
    pass


def refine_plan(
    pipe: Any,
    plan: FeaturePlan,
    profile: FeatureProfile,
    recipe: FeatureRecipe,
    call: Mapping[str, Any],
    prompts: Sequence[PicturePrompt],
    *,
    state: Path | None = None,
    evaluations: int,
    minutes: float | None = None,
    progress: Progress | None = None,
) -> FeaturePlan:
    """The best plan found within `plan`'s budget, and never a worse one on these prompts.

    At most `evaluations` schedules are run, the plan's own and those of an earlier, interrupted
    search included; forecast weights, where the plan has any, are fitted to the best of them
    (`picture_weights.py`).  No run is begun after `minutes`.  `state` is the file that keeps the
    schedules; it is removed when no move is left to try.
    """
    schedule, rows = searched(profile, recipe, plan.budget.kept)
    start = computed_steps(plan, rows)

    def candidate(computed: Mask) -> FeaturePlan | None:
        if (computed == start).all():
            return plan
        found = plan_for(profile, recipe, computed, plan.budget.kept)
        if found is None:
            return None
        return replace(
            plan,
            entries=found.entries,
            dt_scale=found.dt_scale,
            text_once=found.text_once,
            budget=replace(plan.budget, reached=found.reached),
            predicted=plan.predicted  # None stays: few bits are not predicted
            and FeatureDamage(
                error=found.predicted_error, prompts=profile.prompts, digest=profile.prompts_digest
            ),
            measured=None,
        )

    trials = _resumed(state, plan, profile, prompts)
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    runs = _Runs(pipe, call, prompts, candidate, trials, state, deadline)

    def told(count: int, _: float) -> None:
        if progress:
            progress(count, evaluations, f"error {runs.first:.4g} -> {runs.reached:.4g}")

    fixed = float(schedule.base.sum())
    try:
        found = improve(
            start,
            runs.error,
            forced=schedule.forced,
            rate=schedule.rate,
            budget=max(schedule.budget - fixed, float((start.sum(1) * schedule.rate).sum())),
            worth=WORTH,
            evaluations=evaluations,
            guide=schedule,
            progress=told,
        )
        finished, ending = found.finished, "no move of one step improves it"
    except _OutOfTime:
        finished = False
    if not finished:
        ending = "stopped before all moves were tried"
    refined = candidate(runs.best)
    assert refined is not None
    if directions(refined) and len(prompts) > 1:
        refined, words, in_time = _reweighted(refined, runs, told)
        finished, ending = finished and in_time, f"{ending}; {words}"
    if finished and state is not None:
        state.unlink(missing_ok=True)
    certificate = Certificate(
        solver="local search",
        value=runs.reached,
        bound=None,
        gap=None,
        status=f"Refined from the measured error {runs.first:.4g} to {runs.reached:.4g} on "
        f"{len(prompts)} calibration prompts, {len(runs.known)} schedules run; {ending}.",
    )
    refined = replace(refined, certificate=certificate)
    check(refined)
    return refined


def _reweighted(
    plan: FeaturePlan, runs: _Runs, told: Callable[[int, float], None]
) -> tuple[FeaturePlan, str, bool]:
    """The plan with its weights fitted, what to say of it, and whether time sufficed."""
    before, best, in_time = runs.reached, plan, True

    def better(found: FeaturePlan, value: float) -> None:
        nonlocal best
        best, runs.reached = found, value
        told(len(runs.known), value)

    try:
        full = [runs.reference(index) for index in range(len(runs.calls))]
        fit_weights(plan, runs.latent, full, worth=WORTH, better=better)
    except _OutOfTime:
        in_time = False
    gained = f"from {before:.4g}" if best is not plan else "without gain"
    return best, f"weights fitted {gained}" + ("" if in_time else " until time was up"), in_time


def halves(prompts: int) -> tuple[range, ...]:
    """Every other prompt, and the rest; one prompt is a half by itself."""
    return tuple(half for half in (range(0, prompts, 2), range(1, prompts, 2)) if half)


def computed_steps(plan: FeaturePlan, rows: Rows) -> Mask:
    """`[rows, T]`: the steps at which no entry names a site of the row."""
    left_out: list[set[FeatureSite]] = [set() for _ in range(plan.model.steps)]
    for entry in plan.entries:
        left_out[entry.step].add(entry.site)
    return np.array([[row.isdisjoint(found) for found in left_out] for row in rows])


class _Runs:
    """The objective: what is left of the plan's own error, remembered for every schedule.

    Errors are those of the final latent, relative to its length.  Of the two halves of the prompts
    that one counts whose mean error has shrunk less.
    """

    def __init__(
        self,
        pipe: Any,
        call: Mapping[str, Any],
        prompts: Sequence[PicturePrompt],
        candidate: Callable[[Mask], FeaturePlan | None],
        trials: Trials,
        state: Path | None,
        deadline: float,
    ) -> None:
        self.pipe, self.candidate = pipe, candidate
        self.trials, self.state, self.deadline = trials, state, deadline
        self.known = {tried.steps: tried.errors for tried in trials.tried}
        self.calls = [({**call, **prompt.call}, prompt.seed) for prompt in prompts]
        self.order = list(range(len(prompts)))
        self.full: list[Tensor | None] = [None] * len(prompts)
        self.start: tuple[float, ...] = ()  # errors of the plan's own schedule, in order of prompts
        self.value = math.inf  # of the objective, for the best schedule
        self.first = self.reached = math.inf  # mean error of the plan, and of the best
        self.best: Mask = np.zeros((0, 0), np.bool_)

    def error(self, computed: Mask) -> float:
        steps = "/".join("".join("01"[int(fresh)] for fresh in row) for row in computed)
        if steps not in self.known:
            plan = self.candidate(computed)
            if plan is None:
                return math.inf
            self.known[steps] = self._run(plan)
            self._keep(Tried(steps=steps, errors=self.known[steps]))
        errors = self.known[steps]
        if not self.start:
            self.start, self.first = errors, sum(errors) / len(errors)
            self.order = np.argsort(-np.array(errors), kind="stable").tolist()  # hardest first
            errors = tuple(sorted(errors, reverse=True))
        found = self._share(errors)
        if len(errors) < len(self.calls):  # given up: it is at least as large as that
            return max(found, self.value)
        if found < self.value * (1 - WORTH) or self.value == math.inf:
            self.best, self.value, self.reached = computed, found, sum(errors) / len(self.calls)
        return found

    def _run(self, plan: FeaturePlan) -> tuple[float, ...]:
        errors: list[float] = []
        for index in self.order:
            full = self.reference(index)
            error = math.sqrt(relative_square(self.latent(plan, index), full))
            errors.append(error if math.isfinite(error) else LOST)
            if self.start and self._share(errors) >= self.value * (1 - WORTH):
                break
        return tuple(errors)

    def _share(self, errors: Sequence[float]) -> float:
        """The objective for errors in the order of runs; what it is at least, where some lack."""
        found = dict(zip(self.order, errors, strict=False))
        shares = []
        for half in halves(len(self.start)):
            before = sum(self.start[index] for index in half)
            shares.append(sum(found.get(index, 0.0) for index in half) / max(before, _LEAST))
        return max(shares)

    def reference(self, index: int) -> Tensor:
        """The final latent of a prompt's full run."""
        found = self.full[index]
        if found is None:
            arguments, seed = self._next(index)
            found = self.full[index] = run_pipeline(self.pipe, arguments, seed=seed).latent
        return found

    def latent(self, plan: FeaturePlan, index: int) -> Tensor:
        """The final latent of a prompt under a plan."""
        arguments, seed = self._next(index)
        with apply_features(self.pipe, plan):
            return run_pipeline(self.pipe, arguments, seed=seed).latent

    def _next(self, index: int) -> tuple[dict[str, Any], int]:
        """What a run is given; no other is begun when time is up, once the plan is measured."""
        if time.monotonic() >= self.deadline and self.value < math.inf:
            raise _OutOfTime
        return self.calls[index]

    def _keep(self, tried: Tried) -> None:
        self.trials = replace(self.trials, tried=(*self.trials.tried, tried))
        if self.state is not None:
            _write(self.trials, self.state)


def _write(trials: Trials, path: Path) -> None:
    text = json.dumps(encode(Trials, trials), indent=1)
    atomic_write(path, (text + "\n").encode())


def _resumed(
    path: Path | None, plan: FeaturePlan, profile: FeatureProfile, prompts: Sequence[PicturePrompt]
) -> Trials:
    """The trials in the file, if there is one; InputError if they are of another search."""
    own = "sha256:" + hashlib.sha256(dumps(plan)).hexdigest()
    fresh = Trials(plan=own, profile=profile.digest, prompts=digest(prompts))
    if path is None:
        return fresh
    if not path.exists():
        _write(fresh, path)  # an output that cannot be written is noticed before the work
        return fresh
    try:
        found: Trials = decode(Trials, json.loads(path.read_bytes()))
    except (OSError, ValueError, PlanError) as error:
        raise InputError(
            f"{path} is no interrupted refinement that can be read ({error}): delete it, or choose "
            "another --out."
        ) from error
    if replace(found, tried=()) != fresh:
        raise InputError(
            f"{path} is an interrupted refinement of another plan or with other prompts: delete "
            "it, or choose another --out."
        )
    return found
