"""Measure feature plans against the full run of the same pipeline from the same noise."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cacheplan.adapters.flops import flop_counter
from cacheplan.adapters.loop import Loop, watching
from cacheplan.adapters.sampling import Sampled, run_pipeline
from cacheplan.perceptual import SMALLEST, Lpips, missing
from cacheplan.pictures import pixels, psnr, square_error, ssim
from cacheplan.plans.compute import full_flops, planned_flops
from cacheplan.profilers.collect import Progress
from cacheplan.profilers.feature_prompts import PicturePrompt, digest
from cacheplan.runtime.features.apply import apply_features
from cacheplan.types import FeatureDamage, FeaturePlan


@dataclass(frozen=True)
class PictureVerification:
    """Damage on the prompts; what a run cost, and what it was to cost.

    FLOPs are the denoiser's over one run for one prompt, counted by torch on the first prompt.
    Seconds are those of a whole run, mean over prompts; bytes are of kept features.
    `without_lpips` says why pictures were compared by all but LPIPS, if they were.
    """

    damage: FeatureDamage
    planned_flops: int
    counted_flops: int
    full_flops: int
    seconds: float
    full_seconds: float
    planned_bytes: int
    measured_bytes: int
    error_per_prompt: tuple[float, ...]
    without_lpips: str | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt: the pictures of the full run and of each plan, if the pipeline makes any."""

    prompt: PicturePrompt
    pictures: tuple[Any, ...]


@dataclass
class _Tally:
    errors: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    similarities: list[float] = field(default_factory=list)
    distances: list[float | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    flops: int = 0
    planned_bytes: int = 0
    measured_bytes: int = 0


def measure_plans(
    pipe: Any,
    plans: Sequence[FeaturePlan],
    call: Mapping[str, Any],
    prompts: Sequence[PicturePrompt],
    *,
    progress: Progress | None = None,
) -> tuple[list[PictureVerification], list[Row]]:
    """Run every prompt in full and under each plan, from the same seed.

    FLOPs are counted in the first prompt's runs, whose times therefore tell nothing: they are not
    used, and a prompt that is alone is run again.  LPIPS is measured where nothing is missing.
    """
    absent = missing()
    lpips = None if absent else Lpips()
    alone = len(prompts) == 1
    tallies, full, rows = [_Tally() for _ in plans], _Tally(), []
    for number, prompt in enumerate(prompts):
        if progress:
            progress(number, len(prompts), "comparing")
        arguments = {**call, **prompt.call}
        first = number == 0
        reference = _timed(pipe, arguments, prompt.seed, [] if first else full.seconds)
        if alone:
            _timed(pipe, arguments, prompt.seed, full.seconds)
        pictures = list(reference.pictures or [])[:1]
        for plan, tally in zip(plans, tallies, strict=True):
            with apply_features(pipe, plan) as report:
                if first:
                    with _counting(pipe) as counted:
                        found = _timed(pipe, arguments, prompt.seed, [])
                    tally.flops = sum(counted) // report.prompts
                if alone or not first:
                    found = _timed(pipe, arguments, prompt.seed, tally.seconds)
                tally.planned_bytes = report.planned_bytes
                tally.measured_bytes = report.peak_bytes + report.gate_bytes
            _compare(tally, reference, found, lpips)
            pictures += list(found.pictures or [])[:1]
        rows.append(Row(prompt, tuple(pictures)))
    if progress:
        progress(len(prompts), len(prompts), "done")
    results = [
        _result(plan, tally, full, prompts, absent)
        for plan, tally in zip(plans, tallies, strict=True)
    ]
    return results, rows


def _timed(pipe: Any, arguments: dict[str, Any], seed: int, seconds: list[float]) -> Sampled:
    _settle()
    started = time.perf_counter()
    found = run_pipeline(pipe, arguments, seed=seed, pictures=True)
    _settle()
    seconds.append(time.perf_counter() - started)
    return found


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _counting(pipe: Any) -> Iterator[list[int]]:
    """Yield a list that gets the FLOPs of every call of the denoiser."""
    counted: list[int] = []

    def on_call(loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with flop_counter() as counter:
            output = inner(*args, **kwargs)
        counted.append(counter.get_total_flops())
        return output

    with watching(pipe, on_call=on_call):
        yield counted


def _compare(tally: _Tally, full: Sampled, found: Sampled, lpips: Lpips | None) -> None:
    tally.errors.append(_relative(found.latent, full.latent))
    for a, b in zip(full.pictures or [], found.pictures or [], strict=True):
        one, other = pixels(a), pixels(b)
        tally.squares.append(square_error(one, other))
        tally.similarities.append(ssim(one, other))
        tally.distances.append(lpips(one, other) if lpips else None)


def _relative(found: Tensor, full: Tensor) -> float:
    """`|found - full| / |full|`."""
    return float((found.double() - full.double()).norm() / full.double().norm())


def _result(
    plan: FeaturePlan,
    tally: _Tally,
    full: _Tally,
    prompts: Sequence[PicturePrompt],
    absent: str | None,
) -> PictureVerification:
    shown = bool(tally.squares)
    distances = [distance for distance in tally.distances if distance is not None]
    lpips = _mean(distances) if shown and len(distances) == len(tally.distances) else None
    small = f"LPIPS is not measured, it needs pictures of {SMALLEST} x {SMALLEST} pixels or more."
    return PictureVerification(
        damage=FeatureDamage(
            error=_mean(tally.errors),
            psnr=psnr(_mean(tally.squares)) if shown else None,
            ssim=_mean(tally.similarities) if shown else None,
            lpips=lpips,
            prompts=len(prompts),
            digest=digest(prompts),
        ),
        planned_flops=planned_flops(plan),
        counted_flops=tally.flops,
        full_flops=full_flops(plan.model),
        seconds=_mean(tally.seconds),
        full_seconds=_mean(full.seconds),
        planned_bytes=tally.planned_bytes,
        measured_bytes=tally.measured_bytes,
        error_per_prompt=tuple(tally.errors),
        without_lpips=absent or small if shown and lpips is None else None,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
