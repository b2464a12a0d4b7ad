"""Draw a picture under a plan and report what it took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cacheplan.errors import InputError, UnsupportedError
from cacheplan.picture_inputs import (
    Pipeline,
    check_prompts,
    open_for_plan,
    picture_prompts_for,
)
from cacheplan.types import FeaturePlan

if TYPE_CHECKING:
    from cacheplan.profilers.collect import Progress
    from cacheplan.profilers.feature_prompts import PicturePrompt

_MANY = ("num_frames", "audio_length_in_s", "audio_end_in_s")  # of pipelines that make no picture


@dataclass(frozen=True, eq=False)
class Drawing:
    """A PIL image; of the denoiser's FLOPs the shares that were planned and done.

    The gate of a plan may compute more than was planned: at the `promoted` steps.  Bytes are of
    kept features, and `path` is the implementation of the forecast kernel.
    """

    picture: Any
    prompt: str
    seed: int
    steps: int
    promoted: tuple[int, ...]
    planned_share: float
    done_share: float
    seconds: float
    planned_bytes: int
    measured_bytes: int
    path: str


def draw(
    plan: FeaturePlan,
    *,
    prompt: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    model: str | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    cache_memory: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Drawing:
    """Draw the picture of `prompt` under the plan, or of `arguments` of the pipeline.

    Without either, the embedded model gets its first held-out prompt.  `seed` None is that of the
    prompt, else 0.  `settings` of the call must be the plan's.  Kept features may take at most
    `cache_memory` bytes.
    """
    from cacheplan.adapters.loop import Loop, denoisers, watching
    from cacheplan.adapters.sampling import run_pipeline
    from cacheplan.kernels.forecast.dispatch import path
    from cacheplan.runtime.features.apply import apply_features

    if prompt is not None and arguments is not None:
        raise InputError("Both a prompt and arguments are given: put the prompt into these.")
    if prompt is not None and not prompt.strip():
        raise InputError("The prompt is empty: give at least one word.")
    opened = open_for_plan(plan, model=model, settings=settings or {}, device=device, dtype=dtype)
    _check_pictures(opened)
    given = {"prompt": prompt} if prompt is not None else arguments
    asked = _prompt(opened, given, seed)

    def on_step(loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = inner(*args, **kwargs)
        if progress:
            progress(loop.step + 1, loop.steps, "drawing")
        return output

    with (
        apply_features(opened.pipe, plan, cache_memory=cache_memory) as report,
        watching(opened.pipe, on_step=on_step),
    ):
        started = time.perf_counter()
        call = {**opened.call, **asked.call}
        found = run_pipeline(opened.pipe, call, seed=asked.seed, pictures=True)
        seconds = time.perf_counter() - started
    if not found.pictures or len(found.pictures) > 1:
        raise UnsupportedError(
            f"{opened.name} made {len(found.pictures or [])} pictures, but only one can be "
            "written: ask for one."
        )
    kind: Any = next(iter(denoisers(opened.pipe).values())).dtype
    return Drawing(
        picture=found.pictures[0],
        prompt=asked.text,
        seed=asked.seed,
        steps=report.steps,
        promoted=tuple(report.promoted),
        planned_share=report.planned_flops / report.full_flops,
        done_share=report.flops / report.full_flops,
        seconds=seconds,
        planned_bytes=report.planned_bytes,
        measured_bytes=report.peak_bytes + report.gate_bytes,
        path=path(found.latent.device, kind),
    )


def _check_pictures(opened: Pipeline) -> None:
    """Refuse other outputs than pictures before the work."""
    if any(opened.accepts(name) for name in _MANY):
        raise UnsupportedError(
            f"{type(opened.pipe).__name__} makes no single picture, which is all that can be "
            "written so far: use cacheplan.apply(pipe, plan) in a program."
        )


def _prompt(opened: Pipeline, given: Mapping[str, Any] | None, seed: int | None) -> PicturePrompt:
    from cacheplan.profilers.feature_prompts import picture_prompt

    if given is None:
        first = picture_prompts_for(opened, None, "heldout", 1)[0]
        return picture_prompt(first.call, first.seed if seed is None else seed)
    found = picture_prompt(dict(given), seed or 0)
    check_prompts(opened, [found])
    return found
