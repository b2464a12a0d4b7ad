"""Fixed masks of computed steps, the presets of cache-dit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cacheplan.errors import InputError
from cacheplan.solvers.schedule import (
    Mask,
    affordable,
    checked_schedule,
    rates,
    solution,
    too_small,
)
from cacheplan.types.problem import Schedule, Solution

POLICIES = ("slow", "medium", "fast", "ultra")  # computing less and less

# by the number of steps they are for: lengths of runs, computed, skipped, computed ...
_RUNS = {
    28: (
        (8, 1, 3, 2, 3, 2, 2, 2, 1, 3, 1),
        (6, 1, 2, 3, 2, 3, 2, 3, 2, 3, 1),
        (6, 1, 1, 3, 1, 4, 1, 5, 1, 4, 1),
        (4, 2, 1, 5, 1, 6, 1, 7, 1),
    ),
    15: (
        (4, 1, 2, 1, 2, 1, 2, 1, 1),
        (4, 1, 2, 1, 1, 2, 1, 2, 1),
        (3, 1, 1, 2, 1, 2, 1, 3, 1),
        (2, 1, 1, 2, 1, 3, 1, 3, 1),
    ),
    9: ((5, 1, 2, 0, 1), (5, 1, 1, 1, 1), (4, 1, 1, 2, 1), (3, 2, 1, 2, 1)),
    8: ((5, 1, 1, 0, 1), (4, 1, 1, 1, 1), (3, 1, 1, 2, 1), (2, 2, 1, 2, 1)),
    6: ((3, 2, 1),) * 4,
    4: ((2, 1, 1),) * 4,
}


@dataclass(frozen=True)
class StepsMask:
    """The same preset for every site: a baseline that measures nothing.

    cache-dit's "steps computation mask" (vipshop/cache-dit), with its rules for other numbers of
    steps.  Forced steps are computed too.  `policy=None` takes the one of most computations that
    the budget buys.
    """

    policy: str | None = None

    def __call__(self, problem: Schedule) -> Solution:
        problem = checked_schedule(problem)
        for policy in POLICIES if self.policy is None else (self.policy,):
            computed = problem.forced | steps_mask(policy, problem.forced.shape[1])
            rate = math.fsum(rates(problem, computed))
            if affordable(problem, rate):
                return solution(problem, computed, f'The steps of the preset "{policy}".')
        raise too_small(problem, rate, f'the preset "{policy}"')


def steps_mask(policy: str, steps: int) -> Mask:
    """Which of `steps` steps a preset computes, `[T]`.

    More than 28 steps lengthen the runs for 28, front to back, until they suffice; fewer shorten
    a preset from the end, last skipped and last computed run in turn.
    """
    if policy not in POLICIES:
        raise InputError(f'There is no preset "{policy}": choose one of {", ".join(POLICIES)}.')
    if steps not in _RUNS and steps < 8:
        raise InputError(f"The presets are for 4, 6, 8 or more steps, not for {steps}.")
    base = next((n for n in (4, 6, 8, 9, 15) if steps <= n), 28)
    runs = list(_RUNS[base][POLICIES.index(policy)])
    _lengthen(runs, steps)
    computed, skipped = _shorten(runs, steps)
    mask = np.zeros(steps, dtype=np.bool_)
    start = 0
    for index, length in enumerate(computed):
        mask[start : start + length] = True
        start += length + (skipped[index] if index < len(skipped) else 0)
    mask[-1] = True
    return mask


def _lengthen(runs: list[int], steps: int) -> None:
    """Each run grows by its length times `steps / 56`, at least 1; the last always by 1."""
    growth = [max(int(length * (steps / 28 * 0.5)), 1) for length in runs[:-1]] + [1]
    while sum(runs) < steps:
        for index, more in enumerate(growth):
            runs[index] += more
            if sum(runs) >= steps:
                return


def _shorten(runs: list[int], steps: int) -> tuple[list[int], list[int]]:
    """Computed and skipped runs without what exceeds `steps`."""
    computed, skipped = runs[::2], runs[1::2]
    turn, excess = 0, sum(runs) - steps
    while excess > 0:
        last = (skipped, computed)[turn % 2]
        turn += 1
        if last:
            last[-1] -= 1
            excess -= 1
            if not last[-1]:
                last.pop()
    return computed, skipped
