"""The caches of diffusers that run on a PixArt pipeline, each with the knobs to sweep.

PixArt's pipeline sets no cache context and its transformer is no `CacheMixin`, so hooks are applied
by their functions, and the context is set here at every call as pipelines that know caches do it.
Not here: TextKVCache hooks nothing but NucleusMoE blocks, and LayerSkip leaves layers out for
guidance, not to save steps.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import diffusers.hooks as hooks
import torch
from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context
from picture_runs import Setting
from torch import Tensor

from cacheplan.adapters.loop import Loop, watching

PARTS = r"transformer_blocks\.\d+\.(attn1|attn2|ff)"  # the default patterns match none of them
EVERY_STEP = (-1, 1001)  # of timesteps
Apply = Callable[[Any, Any], None]  # of the module and a configuration


def settings(steps: int, ratios: Sequence[float]) -> list[Setting]:
    """All settings for a run of `steps`; `ratios` are those of `magnitudes`."""
    return [
        *_first_block(),
        *_taylorseer(),
        *_magcache(steps, ratios),
        *_broadcast(),
        *_fastercache(),
        *_seacache(),
    ]


def magnitudes(pipe: Any, run: Callable[[Any], Any], steps: int) -> list[float]:
    """MagCache's ratios, which its calibration prints, of the one run that `run(pipe)` makes."""
    config = hooks.MagCacheConfig(calibrate=True, num_inference_steps=steps)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), _hooked(pipe, hooks.apply_mag_cache, config):
        run(pipe)
    lists = [line for line in printed.getvalue().splitlines() if line.startswith("[1.0")]
    ratios = ast.literal_eval(lists[-1])
    assert len(ratios) == steps
    return list(map(float, ratios))


def _first_block() -> Iterator[Setting]:
    for threshold in (0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.6):
        config = hooks.FirstBlockCacheConfig(threshold=threshold)
        yield _setting(
            "diffusers FirstBlockCache",
            f"threshold {threshold:g}",
            hooks.apply_first_block_cache,
            config,
            online=True,
        )


def _taylorseer() -> Iterator[Setting]:
    warmups, intervals = (3, 6, 9, 12), (2, 3, 4, 6)
    swept = [*product((0, 1), (1,), intervals, warmups), *product((1,), (2,), intervals, (6,))]
    for lite, order, interval, warmup in swept:
        config = hooks.TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=warmup,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            **({"use_lite_mode": True} if lite else {"cache_identifiers": [PARTS]}),
        )
        yield _setting(
            f"diffusers TaylorSeer{' lite' if lite else ''}",
            f"order {order}, interval {interval}, warm-up {warmup}",
            hooks.apply_taylorseer_cache,
            config,
        )


def _magcache(steps: int, ratios: Sequence[float]) -> Iterator[Setting]:
    thresholds = (0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 1.0)
    for (skips, kept), threshold in product(((3, 0.2), (6, 0.1)), thresholds):
        config = hooks.MagCacheConfig(
            threshold=threshold,
            max_skip_steps=skips,
            retention_ratio=kept,
            num_inference_steps=steps,
            mag_ratios=list(ratios),
        )
        yield _setting(
            "diffusers MagCache",
            f"threshold {threshold:g}, at most {skips} skips, first {kept:g} kept",
            hooks.apply_mag_cache,
            config,
        )


def _broadcast() -> Iterator[Setting]:
    for spatial, cross, steps in product((2, 6), (2, 6), ((100, 800), EVERY_STEP)):
        config = hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=spatial,
            cross_attention_block_skip_range=cross,
            spatial_attention_timestep_skip_range=steps,
            cross_attention_timestep_skip_range=steps,
        )
        yield _setting(
            "diffusers PAB",
            f"every {spatial}, cross {cross}, timesteps {steps}",
            hooks.apply_pyramid_attention_broadcast,
            config,
        )


def _fastercache() -> Iterator[Setting]:
    for guidance, spatial, steps in product((2, 5), (2, 4), ((-1, 681), EVERY_STEP)):
        config = hooks.FasterCacheConfig(
            unconditional_batch_skip_range=guidance,
            unconditional_batch_timestep_skip_range=steps,
            spatial_attention_block_skip_range=spatial,
            spatial_attention_timestep_skip_range=steps,
            tensor_format="BCHW",
        )
        yield _setting(
            "diffusers FasterCache",
            f"unconditional every {guidance}, attention every {spatial}, timesteps {steps}",
            hooks.apply_faster_cache,
            config,
        )


def _seacache() -> Iterator[Setting]:
    """SeaCache is for video and looks at the latents of frames: a picture is a video of one."""
    for skips, threshold in product((2, 5), (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 1.6)):
        config = hooks.SeaCacheConfig(
            threshold=threshold, max_consecutive_cached=skips, raw_vision_callback=_frames
        )
        yield _setting(
            "diffusers SeaCache",
            f"threshold {threshold:g}, at most {skips} skips",
            hooks.apply_sea_cache,
            config,
            online=True,
        )


def _frames(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    latents: Tensor = args[0] if args else kwargs["hidden_states"]
    return [latent[:, None] for latent in latents.chunk(2)[1]]


def _setting(method: str, knob: str, apply: Apply, config: Any, *, online: bool = False) -> Setting:
    return Setting(method, knob, lambda pipe: _hooked(pipe, apply, config), online=online)


@contextmanager
def _hooked(pipe: Any, apply: Apply, config: Any) -> Iterator[None]:
    """Hooks, with states that are new in every run and the context of every call."""
    module = pipe.transformer

    def fresh(loop: Loop) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.reset_stateful_hooks(recurse=True)

    def called(loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = loop.step
        context = CacheContext(
            "cond_uncond", step, loop.steps, loop.timesteps[step], loop.sigmas[step]
        )
        _set_cache_context(module, context)
        return inner(*args, **kwargs)

    with watching(pipe, on_start=fresh, on_call=called) as loop:
        config = copy.copy(config)  # FasterCache writes into it
        if hasattr(config, "current_timestep_callback"):
            config.current_timestep_callback = lambda: loop.timesteps[loop.step]
        apply(module, config)
        yield
