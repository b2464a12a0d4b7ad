"""Another guidance scale than the plan's is noticed wherever it shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cacheplan.errors import UnsupportedError
from cacheplan.runtime import apply
from cacheplan.runtime.features.guidance import combined


@pytest.mark.parametrize("name", ["pixart", "dit", "wan", "sd3", "flux", "stable_diffusion"])
def test_another_scale_is_refused(
    name: str, family: Any, entry: Callable[..., Any], feature_plan: Callable[..., Any]
) -> None:
    """Pipelines with a property, without one, with a learned variance, and guided inside."""
    model = family(name)
    last = len(model.spec.blocks)
    site = ("branch", 1, last - 1) if model.unet else ("hidden", 0, last)
    plan = feature_plan(model.spec, [entry(*site, 1)])
    planned = json.loads(model.spec.call)["guidance_scale"]
    with apply(model.pipe, plan):
        expected = model.run()
        words = f"guidance scale {planned + 1:g}, but the plan was made for {planned:g}"
        with pytest.raises(UnsupportedError, match=words):
            model.run(guidance_scale=planned + 1)
        assert torch.equal(model.run(guidance_scale=planned), expected)


def test_a_plan_that_knows_no_scale_refuses_none(
    family: Any, entry: Callable[..., Any], feature_plan: Callable[..., Any]
) -> None:
    model = family("pixart")
    plan = feature_plan(
        replace(model.spec, call="{}"), [entry("hidden", 0, len(model.spec.blocks), 1)]
    )
    with apply(model.pipe, plan):
        model.run(guidance_scale=7.0)


@given(st.floats(0.1, 30), st.integers(1, 3), st.booleans(), st.integers(0, 9))
def test_scales_are_read_off_the_outputs(scale: float, rows: int, once: bool, seed: int) -> None:
    a, b, other = torch.randn(3, rows, 8, 2, 2, generator=torch.Generator().manual_seed(seed))
    guided = (a + scale * (b - a))[:, :4]  # the rest is a learned variance
    outputs = [torch.cat([a, b])] if once else [a, b]
    assert combined(outputs, guided) == pytest.approx(scale, rel=1e-3)
    assert combined(outputs[::-1], other[:, :4]) is None
    assert combined([a], guided) is None
    assert combined([a, a], guided) is None
    assert combined([a, b, b], guided) is None
    assert combined(outputs, torch.cat([guided, guided])) == pytest.approx(scale, rel=1e-3)
