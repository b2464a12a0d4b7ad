"""Is a denoiser called with the timestep of the step that was counted?

Pipelines hand the scheduler's timestep over as it is, divided by the number of training steps,
scaled, counted from the other end, expanded over the batch or per token (with 0 for tokens that
are given).  Which of these it is shows at the first call of a run; the others must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cacheplan.errors import UnsupportedError

Relation = Callable[[float], float]


def relations(train_steps: float, scale: float) -> tuple[Relation, ...]:
    """The forms a timestep t may have; `scale` is the denoiser's own (Sana)."""
    T = train_steps
    return (
        lambda t: t,
        lambda t: t / T,
        lambda t: t * scale,
        lambda t: 1 - t / T,
        lambda t: T - t,
    )


class Clock:
    """Checks the timesteps of one run against `timesteps`, the scheduler's own."""

    def __init__(self, timesteps: Sequence[float], train_steps: float, scale: float = 1.0) -> None:
        self.timesteps = timesteps
        self.fitting = relations(train_steps, scale)

    def check(self, step: int, timestep: Any) -> None:
        """Raise UnsupportedError if `timestep` belongs to another step than `step`."""
        if not self.fitting:
            return
        value, tolerance = _largest(timestep)

        def fits(relation: Relation, t: float) -> bool:
            expected = relation(t)
            if tolerance is None:
                return abs(value - expected) <= 1.0
            return abs(value - expected) <= tolerance * abs(expected) + 1e-6 * abs(relation(0.0))

        now = [relation for relation in self.fitting if fits(relation, self.timesteps[step])]
        if now or step > 0:
            elsewhere = not now
        else:
            starts = [
                k for k, t in enumerate(self.timesteps) if any(fits(r, t) for r in self.fitting)
            ]
            if starts:
                raise late_start(starts[0], len(self.timesteps))
            elsewhere = False  # a form unknown here: nothing to compare with
        if elsewhere:
            raise UnsupportedError(
                f"The denoiser is called with timestep {value:g} at step {step}, where the "
                f"scheduler has {self.timesteps[step]:g}: plans need a sampling loop that calls "
                "scheduler.step once per timestep."
            )
        self.fitting = tuple(now)


def late_start(step: int, steps: int) -> UnsupportedError:
    return UnsupportedError(
        f"The run starts at step {step} of {steps}, but plans hold for whole runs: "
        "start from noise (strength 1, no denoising_start)."
    )


def _largest(timestep: Any) -> tuple[float, float | None]:
    """The largest of the timesteps (given tokens have 0) and what rounding may have changed."""
    if not isinstance(timestep, Tensor):
        timestep = torch.tensor(timestep)
    value = float(timestep.max())
    if not timestep.dtype.is_floating_point:
        return value, None  # rounded to a whole number
    return value, max(1e-5, 4 * torch.finfo(timestep.dtype).eps)
