"""cache-dit's DBCache and its static masks of computed steps, with and without TaylorSeer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")

import cache_dit  # type: ignore[import-not-found]
from picture_runs import Setting

PRESETS = ("slow", "medium", "fast", "ultra")


def settings(steps: int) -> list[Setting]:
    """All settings for a run of `steps`."""
    return [*_dynamic(steps), *_static(steps)]


def _dynamic(steps: int) -> Iterator[Setting]:
    early, late = (0.08, 0.12, 0.16, 0.2, 0.3, 0.4, 0.6), (0.08, 0.12, 0.16, 0.24, 0.4)
    swept = [*product((4,), early), *product((8,), late)]
    for order, (warmup, threshold) in product((0, 1), swept):
        config = cache_dit.DBCacheConfig(
            num_inference_steps=steps,
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=warmup,
            residual_diff_threshold=threshold,
            enable_separate_cfg=False,
        )
        yield _setting(
            "cache-dit DBCache", f"threshold {threshold:g}, warm-up {warmup}", config, order
        )


def _static(steps: int) -> Iterator[Setting]:
    """The four presets, and masks by bins of the user: a warm-up, then one step of every few."""
    masks = {name: cache_dit.steps_mask(mask_policy=name, total_steps=steps) for name in PRESETS}
    for warmup, every in product((3, 6, 9, 12), (2, 3, 4, 6)):
        rounds = -(-(steps - warmup) // every)
        mask = cache_dit.steps_mask(
            compute_bins=[warmup] + [1] * rounds, cache_bins=[every - 1] * rounds, total_steps=steps
        )
        masks[f"first {warmup}, then 1 of {every}"] = [*mask[:-1], 1]
    second = [(2, preset) for preset in masks.items() if preset[0] in PRESETS]
    for order, (name, mask) in [*product((0, 1), masks.items()), *second]:
        config = cache_dit.DBCacheConfig(
            num_inference_steps=steps,
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=1e9,
            steps_computation_mask=mask,
            steps_computation_policy="static",
            enable_separate_cfg=False,
        )
        yield _setting("cache-dit SCM", name, config, order)


def _setting(method: str, knob: str, config: Any, order: int) -> Setting:
    calibrator = None
    if order:
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
        method, knob = f"{method} + TaylorSeer", f"order {order}, {knob}"

    @contextmanager
    def enabled(pipe: Any) -> Iterator[None]:
        own = type(pipe)
        pipe.__class__ = type(own.__name__, (own,), {})  # cache-dit changes `__call__` of the class
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
        yield

    return Setting(method, knob, enabled, online=config.steps_computation_mask is None)
