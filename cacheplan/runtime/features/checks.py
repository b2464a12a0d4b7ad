"""Whether a plan belongs to a pipeline, and whether the pipeline is called as it was profiled."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import nn

from cacheplan.adapters.anatomy import is_unet
from cacheplan.adapters.calls import unwrapped
from cacheplan.adapters.denoiser import pipeline_digest
from cacheplan.adapters.loop import Loop, denoisers
from cacheplan.adapters.settings import scheduler_settings
from cacheplan.adapters.taps import Watched
from cacheplan.errors import UnsupportedError
from cacheplan.plans.check import check, check_model, check_runnable
from cacheplan.plans.rules import RANGES
from cacheplan.plans.words import site_words
from cacheplan.runtime.features.gate import INSIDE, MODULATION
from cacheplan.runtime.features.program import Program
from cacheplan.runtime.features.step_size import arguments
from cacheplan.runtime.features.wiring import Wiring
from cacheplan.types import DiffusionSpec, FeaturePlan, Gate


def check_pipeline(plan: FeaturePlan, pipe: Any) -> None:
    """Refuse what can be refused before a run: another model, scheduler or cache."""
    check(plan)
    check_runnable(plan)
    if isinstance(vars(pipe.scheduler).get("step"), Watched):
        raise UnsupportedError(
            "A plan is already applied to this pipeline: leave its `with` block first."
        )
    found = denoisers(pipe)
    for module in found.values():
        if getattr(unwrapped(module), "is_cache_enabled", False):
            raise UnsupportedError(
                f"{type(unwrapped(module)).__name__} has a cache of diffusers enabled, whose hooks "
                "would not see what the plan leaves out: call its disable_cache() first."
            )
    main = unwrapped(next(iter(found.values())))
    spec = replace(
        plan.model,
        id=pipe.config.get("_name_or_path") or type(pipe).__name__,
        pipeline=type(pipe).__name__,
        architecture=type(main).__name__,
        scheduler=scheduler_settings(pipe.scheduler),
        digest=pipeline_digest(pipe),
    )
    check_model(plan, spec)


def check_gate(gate: Gate, program: Program, root: nn.Module, *, whole: bool) -> None:
    """Refuse gates that would have to decide after the step has begun to follow the plan."""
    if gate.signal not in INSIDE:
        return
    if whole:
        raise UnsupportedError(
            f'The gate "{gate.signal}" decides within the denoiser, which is compiled as a whole: '
            "compile its blocks (compile_repeated_blocks) or use a plan without this gate."
        )
    if is_unet(root):
        raise UnsupportedError(
            f'The gate "{gate.signal}" looks at transformer blocks, but {type(root).__name__} is a '
            'UNet: use the gate "secant" or a plan without a gate.'
        )
    for step, actions in enumerate(program.actions):
        blocks = program.blocks(step)
        probed = blocks[: gate.blocks]
        for site in actions:
            early = site.part != "hidden" and site.first in probed
            if gate.signal == MODULATION:  # the first block is left out after it was run
                early &= site.part not in RANGES
            if site.part == "model" or early or len(probed) == len(blocks):
                raise UnsupportedError(
                    f'The gate "{gate.signal}" runs the first {gate.blocks} blocks to decide, but '
                    f"the plan leaves out {site_words(site)} at step {step}: plan later blocks."
                )


def check_attention(gate: Gate, wiring: Wiring) -> None:
    """Put a tap on the first block's attention; refuse blocks in which it would tell nothing."""
    first = wiring.program.spec.blocks[wiring.blocks[0]]
    if all(part.name != "attention" for part in first.parts):
        raise UnsupportedError(
            f'The gate "{gate.signal}" looks at the attention of {first.path}, which has none that '
            "is known here: use another gate."
        )
    if wiring.traced(wiring.need_attention()):
        raise UnsupportedError(
            f'The gate "{gate.signal}" decides within {first.path}, which is compiled: use a plan '
            "without this gate, or do not compile the blocks."
        )


def check_run(spec: DiffusionSpec, steps: int, sigmas: tuple[float, ...]) -> None:
    """Refuse a run with another schedule than the profile's."""
    if steps != spec.steps:
        raise UnsupportedError(
            f"The run has {steps} steps, but the plan was made for {spec.steps}: run those, or "
            "profile with the number you want."
        )
    for index, (found, expected) in enumerate(zip(sigmas, spec.sigmas, strict=True)):
        if not math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-6):
            raise UnsupportedError(
                f"Noise level {index} of the run is {found:g}, but the plan was made for "
                f"{expected:g}: use the schedule, size and shift of the profile."
            )


def check_step(
    spec: DiffusionSpec, loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse steps with other calls of the denoiser or another latent than the profile's."""
    if loop.call != len(spec.branches):
        raise UnsupportedError(
            f"The denoiser is called {loop.call} times at step {loop.step}, but was profiled with "
            f"the calls {', '.join(spec.branches)}: use the guidance settings of the profile."
        )
    shape = tuple(arguments(inner, args, kwargs)["sample"].shape[1:])
    if loop.step == 0 and shape != spec.latent:
        raise UnsupportedError(
            f"The latent of the run is {' x '.join(map(str, shape))}, but the plan was made for "
            f"{' x '.join(map(str, spec.latent))}: profile at this resolution."
        )
