"""Fit a plan's forecast weights to what the plan really does: least squares on the final latent.

The planner's weights fit features of full runs (`schedules/tables.py`), one step at a time.  Under
the plan the sampler leaves the path of those runs, and errors of one step meet those of another.
Here the weights of all steps are fitted together, so that the final latent comes as near as
possible to the full run's: Gauss-Newton with Marquardt's damping (1963), the derivatives being
differences of runs.  To aim at the full run's next latent instead, step by step, makes it worse:
one step would have to undo the drift of all before it.

How far to go (the damping) and whether to go at all is decided by cross-validation: weights
fitted to all prompts but one must bring that one nearer, on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cacheplan.types import FeaturePlan

Floats = NDArray[np.float64]
Run = Callable[[FeaturePlan, int], Tensor]  # the final latent of a prompt under a plan
STEP = 0.02  # of a weight: more than rounding in half precision, little enough to be linear
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
ROUNDS = 2
_DIGITS = 9
_LEAST = 1e-12


@dataclass(frozen=True)
class Direction:
    """A change of an entry's weights: of the newest key's, or from an older key's to the newest's.

    What changes the sum of the weights, and what changes the slope, which count differently.
    """

    entry: int
    key: int


def directions(plan: FeaturePlan) -> tuple[Direction, ...]:
    """As many as the plan has weights."""
    return tuple(
        Direction(index, key)
        for index, entry in enumerate(plan.entries)
        for key in range(len(entry.action.weights))
    )


def moved(plan: FeaturePlan, along: Sequence[Direction], amounts: Sequence[float]) -> FeaturePlan:
    """The plan with its weights changed by so much in every direction."""
    weights = [list(entry.action.weights) for entry in plan.entries]
    for direction, amount in zip(along, amounts, strict=True):
        weights[direction.entry][0] += amount
        if direction.key:
            weights[direction.entry][direction.key] -= amount
    entries = (
        replace(entry, action=replace(entry.action, weights=tuple(round(w, _DIGITS) for w in own)))
        for entry, own in zip(plan.entries, weights, strict=True)
    )
    return replace(plan, entries=tuple(entries))


@dataclass(frozen=True, eq=False)
class Normal:
    """The normal equations of a linear least squares problem: `square` x = `right`."""

    square: Floats  # [P, P]
    right: Floats  # [P]

    @staticmethod
    def of(parts: Iterable[Normal]) -> Normal:
        """Those of all problems together."""
        squares, rights = zip(*((part.square, part.right) for part in parts), strict=True)
        return Normal(np.sum(squares, axis=0), np.sum(rights, axis=0))

    def solved(self, damping: float) -> Floats:
        """The x that a ridge of `damping` times each unknown's own square holds back."""
        own = np.diag(self.square)
        ridge = damping * own + _LEAST * max(float(own.max()), _LEAST)
        found: Floats = np.linalg.solve(self.square + np.diag(ridge), self.right).astype(np.float64)
        return found


def linearised(
    plan: FeaturePlan,
    along: Sequence[Direction],
    run: Run,
    full: Sequence[Tensor],
    latents: Sequence[Tensor],
) -> list[Normal]:
    """How amounts in all directions move each prompt's final latent to `full`, to first order.

    `latents` are the plan's own.  Each prompt's error is relative to the length of its latent.
    """
    normals = []
    for index, (target, latent) in enumerate(zip(full, latents, strict=True)):
        start, size = _numbers(latent), float(np.linalg.norm(_numbers(target)))
        columns = np.empty((len(along), len(start)))
        for row, direction in enumerate(along):
            columns[row] = _numbers(run(moved(plan, [direction], [STEP]), index)) - start
        columns /= STEP * size
        normals.append(Normal(columns @ columns.T, columns @ ((_numbers(target) - start) / size)))
    return normals


def fit_weights(
    plan: FeaturePlan,
    run: Run,
    full: Sequence[Tensor],
    *,
    worth: float,
    rounds: int = ROUNDS,
    better: Callable[[FeaturePlan, float], None] | None = None,
) -> tuple[FeaturePlan, float]:
    """The best plan found, and its mean relative error: `plan` itself where none is better.

    `full` are the full run's final latents of at least two prompts.  A round takes a run per weight
    and prompt, and one for each of `DAMPINGS`; what it finds must measure better by the share
    `worth`, on all prompts and on each when fitted to the others.  `better` hears of every plan
    that does.  Deterministic if the runs are.
    """
    along = directions(plan)
    latents = [run(plan, index) for index in range(len(full))]
    value = mean_error(latents, full)
    for _ in range(rounds if along else 0):
        normals = linearised(plan, along, run, full, latents)
        crossed = {d: _across(plan, along, normals, run, full, d) for d in DAMPINGS}
        damping = min(crossed, key=lambda d: crossed[d])
        if not crossed[damping] < value * (1 - worth):
            break
        changed = moved(plan, along, Normal.of(normals).solved(damping).tolist())
        reached = [run(changed, index) for index in range(len(full))]
        error = mean_error(reached, full)
        if not error < value * (1 - worth):
            break
        plan, value, latents = changed, error, reached
        if better:
            better(plan, value)
    return plan, value


def _across(
    plan: FeaturePlan,
    along: Sequence[Direction],
    normals: list[Normal],
    run: Run,
    full: Sequence[Tensor],
    damping: float,
) -> float:
    """The mean error if each prompt has the weights fitted to the others."""
    reached = []
    for index in range(len(full)):
        others = Normal.of(normals[:index] + normals[index + 1 :])
        reached.append(run(moved(plan, along, others.solved(damping).tolist()), index))
    return mean_error(reached, full)


def mean_error(latents: Sequence[Tensor], full: Sequence[Tensor]) -> float:
    """Mean over prompts of `|latent - full| / |full|`; infinite where a run ends in NaN."""
    errors = [
        float(np.linalg.norm(_numbers(a) - _numbers(b)) / np.linalg.norm(_numbers(b)))
        for a, b in zip(latents, full, strict=True)
    ]
    found = sum(errors) / len(errors)
    return found if math.isfinite(found) else math.inf


def _numbers(latent: Tensor) -> Floats:
    found: Floats = latent.double().flatten().cpu().numpy()
    return found
