"""Whether the keys and values of a text stay the same, as profiles tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cacheplan.adapters.denoiser import observe
from cacheplan.plans.compute import text_parts
from cacheplan.profilers.feature_ablation import whole_site
from cacheplan.profilers.feature_collect import collect_features
from cacheplan.profilers.feature_prompts import digest, picture_prompt
from cacheplan.profilers.settings import FeatureSettings
from cacheplan.profilers.store import ProfileState
from cacheplan.profilers.text_constancy import TextConstancy

PROMPTS = [picture_prompt({}, 7)]


def profiled(pipe: Any, call: dict[str, Any]) -> ProfileState:
    seen = observe(pipe, call)
    site = whole_site(seen.spec)
    model = type(site)(part="model", first=0, last=len(seen.spec.blocks))
    settings = FeatureSettings(
        model=seen.spec,
        sites=(site, model),
        lags=2,
        tokens=64,
        probes=(site,),
        ablate=0,
        prompts=1,
        prompts_digest=digest(PROMPTS),
        seed=0,
        versions=(),
    )
    state = ProfileState(settings, range(1))
    collect_features(pipe, seen, call, PROMPTS, state, save=lambda state: None)
    return state


@pytest.mark.parametrize("name", ["pixart", "wan", "wan_experts", "ltx", "sana"])
def test_texts_of_real_pipelines_stay_the_same(name: str, tiny_pipeline: Any) -> None:
    state = profiled(*tiny_pipeline(name))
    assert float(state.sums["text_constant"].mean()) == 1.0


@pytest.mark.parametrize("name", ["flux", "sd35", "stable_diffusion"])
def test_nothing_is_said_of_texts_that_are_not_known(name: str, tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline(name)
    if name == "sd35":
        assert not text_parts(observe(pipe, call).spec.blocks)
    else:
        assert "text_constant" not in profiled(pipe, call).sums


def test_a_text_that_changes_is_noticed(tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline("pixart")
    calls = 0

    def drift(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output + 1e-5 * (calls == 5)  # at a single call

    hook = pipe.transformer.caption_projection.register_forward_hook(drift)
    try:
        found = profiled(pipe, call).sums["text_constant"].mean()
    finally:
        hook.remove()
    assert float(found) == 0.0


def test_each_branch_is_compared_with_itself(tiny_pipeline: Any) -> None:
    spec = observe(*tiny_pipeline("wan")).spec
    branch = 0
    watch = TextConstancy(spec, lambda: branch)
    handlers = watch.handlers({spec.blocks[1].path: "blocks.1"})
    assert list(handlers) == ["blocks.1.attn2.to_k", "blocks.1.attn2.to_v"]
    handler, linear = handlers["blocks.1.attn2.to_k"], nn.Identity()
    for branch in (0, 1, 0, 1):
        handler(linear, (torch.full((2,), float(branch)),), {})
    assert watch.constant
    handler(linear, (torch.zeros(2),), {})
    assert not watch.constant
