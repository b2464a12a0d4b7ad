"""What a feature plan may say of linear layers in few bits, and which of it can be simulated."""

from __future__ import annotations

import math

from cacheplan.plans.rules import need, refuse
from cacheplan.plans.rules_storage import check_precision
from cacheplan.types import FeaturePlan, LinearEntry, Precision

_AROUND_ZERO = "two finite numbers, the first at most 0, the second at least 0"


def check_linears(plan: FeaturePlan) -> None:
    """PlanError for layers that are named twice or whose numbers do not fit the steps."""
    known: set[str] = set()
    for index, entry in enumerate(plan.linears):
        at = f"linears[{index}]"
        need(
            bool(entry.path) and entry.path not in known,
            f"{at}.path",
            entry.path,
            "a path that is not taken",
        )
        known.add(entry.path)
        check_precision(entry.action.weight, f"{at}.action.weight")
        check_precision(entry.action.activation, f"{at}.action.activation")
        _check_ranges(entry, plan.model.steps, at)
        for name in ("channel_scale", "channel_shift"):
            _check_vectors(getattr(entry, name), plan.model.steps, f"{at}.{name}")
        scales, shifts = entry.channel_scale, entry.channel_shift
        both = not scales or not shifts or len(scales[0]) == len(shifts[0])
        need(both, f"{at}.channel_shift", shifts, "as many channels as channel_scale")


def check_runnable_linears(plan: FeaturePlan) -> None:
    """UnsupportedError, with what is supported instead, for bits that cannot be simulated."""
    for index, entry in enumerate(plan.linears):
        at = f"linears[{index}].action"
        _check_simulated(entry.action.weight, f"{at}.weight", "channel", (4, 8))
        _check_simulated(entry.action.activation, f"{at}.activation", "tensor", (8,))


def _check_ranges(entry: LinearEntry, steps: int, at: str) -> None:
    rounded, ranges = entry.action.activation.format != "model", entry.ranges
    wanted = f"{steps} ranges, one for each step" if rounded else "none for activations as they are"
    need(len(ranges) == (steps if rounded else 0), f"{at}.ranges", ranges, wanted)
    for step, (low, high) in enumerate(ranges):
        fits = math.isfinite(low) and math.isfinite(high) and low <= 0 <= high
        need(fits, f"{at}.ranges[{step}]", [low, high], _AROUND_ZERO)


def _check_vectors(vectors: tuple[tuple[float, ...], ...], steps: int, at: str) -> None:
    need(len(vectors) in (0, steps), at, vectors, f"none or {steps} vectors, one for each step")
    for step, vector in enumerate(vectors):
        size = len(vectors[0])
        need(0 < len(vector) == size, f"{at}[{step}]", vector, "as many channels as at step 0")
        need(all(map(math.isfinite, vector)), f"{at}[{step}]", vector, "finite numbers")


def _check_simulated(
    precision: Precision, path: str, axis: str, supported: tuple[int, ...]
) -> None:
    if precision.format == "model":
        return
    if precision.format != "int":
        refuse(f"{path}.format", precision.format, '"int" or "model" in linear layers')
    if precision.bits not in supported:
        words = " or ".join(map(str, supported))
        refuse(f"{path}.bits", precision.bits, f"{words} in linear layers")
    if precision != Precision(format="int", bits=precision.bits, axis=axis):
        refuse(f"{path}.axis", precision.axis, f'"{axis}" without group, residual and separable')
