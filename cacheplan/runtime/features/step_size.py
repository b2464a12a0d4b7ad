"""Longer and shorter steps of the scheduler: x' = x + s (x' - x)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cacheplan.errors import UnsupportedError

FIRST_ORDER = {
    "CogVideoXDDIMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
}
NOISE = ("eta", "s_churn")  # arguments of `step` that make it random


class StepSizes:
    """The factor of each step; none at all leave the scheduler alone.

    Only steps that are a deterministic function of latent and output can be scaled: higher
    orders would go on from a latent that they have not seen.
    """

    def __init__(self, scales: tuple[float, ...], scheduler: Any) -> None:
        self.scales = scales
        if all(scale == 1 for scale in scales):
            return
        name, config = type(scheduler).__name__, scheduler.config
        if name not in FIRST_ORDER or not _deterministic(config):
            raise UnsupportedError(
                f"The plan scales step sizes, which {name} with its settings does not allow: use "
                f"a first-order scheduler without noise, such as {', '.join(sorted(FIRST_ORDER))} "
                "(solver_order=1)."
            )
        if scales[-1] != 1:
            raise UnsupportedError(
                f"The plan scales the last step by {scales[-1]:g}, which would leave noise in the "
                "result: its scale must be 1."
            )

    def __call__(self, step: int, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scale = self.scales[step] if self.scales else 1.0
        if scale == 1:
            return inner(*args, **kwargs)
        given = arguments(inner, args, kwargs)
        noisy = [name for name in NOISE if given.get(name)]
        if noisy:
            raise UnsupportedError(
                f"The plan scales step sizes, but the scheduler is given {noisy[0]}="
                f"{given[noisy[0]]}, which adds noise: set it to 0."
            )
        before = given["sample"]
        output = inner(*args, **kwargs)
        if isinstance(output, tuple):
            return (_scaled(before, output[0], scale), *output[1:])
        output.prev_sample = _scaled(before, output.prev_sample, scale)
        return output


def arguments(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call by name."""
    return inspect.signature(inner).bind(*args, **kwargs).arguments


def _deterministic(config: Mapping[str, Any]) -> bool:
    return (
        config.get("solver_order", 1) == 1
        and not config.get("stochastic_sampling", False)
        and not str(config.get("algorithm_type", "")).startswith("sde")
    )


def _scaled(before: Tensor, after: Tensor, scale: float) -> Tensor:
    exact = torch.promote_types(after.dtype, torch.float32)
    base = before.to(exact)
    return (base + scale * (after.to(exact) - base)).to(after.dtype)
