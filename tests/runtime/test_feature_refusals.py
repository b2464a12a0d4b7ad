"""Every way in which a plan does not fit, with its sentence."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch

from cacheplan.errors import InputError, ModelMismatchError, PlanError, UnsupportedError
from cacheplan.runtime import apply
from cacheplan.types import FeatureEntry, FeaturePlan, KVAction

MakeEntry = Callable[..., FeatureEntry]
MakePlan = Callable[..., FeaturePlan]


@pytest.fixture
def wan(family: Any) -> Any:
    return family("wan")


@pytest.fixture
def plan(wan: Any, entry: MakeEntry, feature_plan: MakePlan) -> FeaturePlan:
    return feature_plan(wan.spec, [entry("delta", 1, 3, 1), entry("delta", 1, 3, 4)])


def refuses(
    pipe: Any, plan: FeaturePlan, error: type[Exception], words: str, **options: Any
) -> None:
    with pytest.raises(error, match=words), apply(pipe, plan, **options):
        pass


def test_plans_of_other_pipelines(wan: Any, family: Any, plan: FeaturePlan) -> None:
    refuses(family("flux").pipe, plan, ModelMismatchError, "whose pipeline is WanPipeline")
    wrong = replace(plan, model=replace(plan.model, digest="sha256:0"))
    refuses(wan.pipe, wrong, ModelMismatchError, "whose digest of configuration and weights")
    wrong = replace(plan, model=replace(plan.model, architecture="Other"))
    refuses(wan.pipe, wrong, ModelMismatchError, "whose architecture is Other")
    wrong = replace(plan, entries=plan.entries[::-1])
    refuses(wan.pipe, wrong, PlanError, "sorted by step")


def test_plans_for_other_schedulers(wan: Any, plan: FeaturePlan) -> None:
    before = wan.pipe.scheduler
    try:
        wan.pipe.scheduler = type(before).from_config(before.config, flow_shift=5.0)
        refuses(wan.pipe, plan, ModelMismatchError, "whose scheduler setting flow_shift is 3.0")
        wan.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        refuses(wan.pipe, plan, ModelMismatchError, "whose scheduler setting")
    finally:
        wan.pipe.scheduler = before


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("wan", {"num_inference_steps": 8}, "The run has 8 steps, but the plan was made for 6"),
        ("flux", {"sigmas": [1.0, 0.8, 0.7, 0.5, 0.3, 0.1]}, "Noise level 1 of the run is"),
        ("wan", {"guidance_scale": 1.0}, "The run has guidance scale 1, but the plan was made"),
        ("pixart", {"guidance_scale": 1.0}, "given 1 latents at once, but was profiled with 2"),
        ("wan", {"height": 48}, "profile at this resolution"),
        ("wan", {"num_frames": 9}, "profile at this resolution"),
    ],
)
def test_runs_that_differ_from_the_profile(
    name: str,
    changes: dict[str, Any],
    words: str,
    family: Any,
    entry: MakeEntry,
    feature_plan: MakePlan,
) -> None:
    model = family(name)
    L = len(model.spec.blocks)
    plan = feature_plan(model.spec, [entry("hidden", 0, L, 1), entry("hidden", 0, L, 4)])
    with apply(model.pipe, plan):
        expected = model.run()
        with pytest.raises(UnsupportedError, match=words):
            model.run(**changes)
        assert torch.equal(model.run(), expected)


def test_other_calls_of_the_denoiser_than_profiled(
    family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    flux = family("flux")
    named = replace(flux.spec, branches=("cond", "uncond"))
    plan = feature_plan(named, [entry("hidden", 0, 4, 1)])
    with apply(flux.pipe, plan), pytest.raises(UnsupportedError, match="called 1 times at step 0"):
        flux.run()
    text = {
        "negative_prompt_embeds": torch.randn(1, 5, 24),
        "negative_pooled_prompt_embeds": torch.randn(1, 20),
    }
    plan = feature_plan(flux.spec, [entry("hidden", 0, 4, 1)])
    with apply(flux.pipe, plan), pytest.raises(UnsupportedError, match="use the guidance settings"):
        flux.run(true_cfg_scale=2.0, **text)


def test_guidance_that_ends_within_the_run(
    family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    model = family("stable_diffusion")

    def end(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 1.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[1]
        return kwargs

    plan = feature_plan(model.spec, [entry("branch", 1, 6, 3)])
    tensors = ["latents", "prompt_embeds"]
    with (
        apply(model.pipe, plan),
        pytest.raises(UnsupportedError, match="use the same batch and guidance"),
    ):
        model.run(callback_on_step_end=end, callback_on_step_end_tensor_inputs=tensors)


def test_ranges_that_are_not_one(family: Any, entry: MakeEntry, feature_plan: MakePlan) -> None:
    model = family("flux2")  # text and picture are joined before block 2
    plan = feature_plan(model.spec, [entry("delta", 1, 3, 1)])
    with apply(model.pipe, plan), pytest.raises(UnsupportedError, match="ranges that start there"):
        model.run()
    unet = family("stable_diffusion")
    plan = feature_plan(unet.spec, [entry("branch", 2, 6, 1)])
    refuses(unet.pipe, plan, UnsupportedError, "those below the last up block are down_blocks.1")


def test_ways_of_calling_that_a_plan_does_not_survive(wan: Any, plan: FeaturePlan) -> None:
    with apply(wan.pipe, plan):
        refuses(wan.pipe, plan, UnsupportedError, "already applied")
        with pytest.raises(UnsupportedError, match="call the pipeline, not its parts"):
            wan.pipe.transformer(torch.zeros(1), torch.zeros(1), torch.zeros(1))
        call = inspect.unwrap(type(wan.pipe).__call__)  # without no_grad
        with torch.enable_grad(), pytest.raises(UnsupportedError, match="gradients enabled"):
            call(wan.pipe, **wan.call)
    wan.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    try:
        refuses(wan.pipe, plan, UnsupportedError, "call its disable_cache")
    finally:
        wan.pipe.transformer.disable_cache()


def test_memory_beyond_the_limit(wan: Any, plan: FeaturePlan, make_plan: Any) -> None:
    with apply(wan.pipe, plan) as report:
        wan.run()
    needed = report.planned_bytes
    assert report.peak_bytes == needed > 0
    refuses(
        wan.pipe,
        plan,
        UnsupportedError,
        f"keeps {needed} bytes of features",
        cache_memory=needed - 1,
    )
    two = {
        name: torch.cat([value] * 2)
        for name, value in wan.call.items()
        if isinstance(value, torch.Tensor)
    }
    with apply(wan.pipe, plan, cache_memory=needed):
        wan.run()
        with pytest.raises(UnsupportedError, match=f"keeps {2 * needed} bytes .* for 2 prompts"):
            wan.run(**two)
    with pytest.raises(InputError, match="solve the plan for a budget in bytes"):
        apply(wan.pipe, make_plan(KVAction(keep=0.5)), cache_memory=1)
