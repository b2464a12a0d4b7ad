"""Longer and shorter steps of the scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from cacheplan.adapters.loop import watching
from cacheplan.errors import UnsupportedError
from cacheplan.runtime import apply
from cacheplan.runtime.features.step_size import StepSizes
from cacheplan.types import FeaturePlan

MakePlan = Callable[..., FeaturePlan]

SCALES = (1.0, 1.2, 0.9, 1.0, 1.1, 1.0)


@pytest.mark.parametrize("name", ["flux", "dit", "cogvideox"])
def test_steps_are_scaled(
    name: str, family: Any, feature_plan: MakePlan, close: Callable[..., bool]
) -> None:
    model = family(name)
    steps = []

    def on_step(loop: Any, inner: Any, args: Any, kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        before = args[2]
        after = output[0] if isinstance(output, tuple) else output.prev_sample
        steps.append((before, after))
        return output

    plan = feature_plan(model.spec, (), None, SCALES)
    with apply(model.pipe, plan), watching(model.pipe, on_step=on_step):
        scaled = model.run()
    assert not close(scaled, model.full)
    scheduler = model.pipe.scheduler
    assert "step" not in vars(scheduler)
    with watching(model.pipe, on_step=on_step):
        model.run()
    (x, ours), (y, plain) = steps[1], steps[7]
    assert torch.equal(x, y)
    torch.testing.assert_close(ours, x + 1.2 * (plain - x))
    ones = feature_plan(model.spec, (), None, (1.0,) * 6)
    with apply(model.pipe, ones):
        assert torch.equal(model.run(), model.full)


def test_only_first_order_steps_without_noise_are_scaled(feature_plan: MakePlan) -> None:
    refused = [
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.DPMSolverMultistepScheduler(solver_order=1, algorithm_type="sde-dpmsolver++"),
        diffusers.UniPCMultistepScheduler(),
        diffusers.EulerAncestralDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        diffusers.HeunDiscreteScheduler(),
    ]
    for scheduler in refused:
        with pytest.raises(UnsupportedError, match="use a first-order scheduler without noise"):
            StepSizes(SCALES, scheduler)
    StepSizes(SCALES, diffusers.DPMSolverMultistepScheduler(solver_order=1))
    StepSizes((), refused[0])
    euler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(UnsupportedError, match=r"scales the last step by 1\.1"):
        StepSizes((1.0, 1.1), euler)
    sizes = StepSizes((1.5, 1.0), euler)
    euler.set_timesteps(2)
    with pytest.raises(UnsupportedError, match=r"s_churn=0\.1, which adds noise"):
        sizes(0, euler.step, (torch.zeros(1), 0, torch.zeros(1)), {"s_churn": 0.1})
