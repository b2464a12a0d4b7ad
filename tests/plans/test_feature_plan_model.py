from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cacheplan.errors import ModelMismatchError, UnsupportedError
from cacheplan.plans.check import check_model, check_runnable, kv_only
from cacheplan.plans.io import read_plan
from cacheplan.types import (
    FeatureAction,
    FeatureEntry,
    FeaturePlan,
    FeatureSite,
    Gate,
    Part,
)

LOADED = read_plan(Path(__file__).with_name("golden_features.json"))
assert isinstance(LOADED, FeaturePlan)
PLAN = LOADED


def with_entry(entry: FeatureEntry) -> FeaturePlan:
    """A plan of one entry; nothing but the entry is looked at."""
    return replace(PLAN, entries=(entry,))


MLP = FeatureSite(part="mlp", first=0, last=1)
SPLINE = FeatureAction(do="forecast", basis="spline")
REUSE = FeatureAction(do="reuse")


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (
            with_entry(FeatureEntry(site=MLP, step=3, action=SPLINE)),
            'entries[0].action.basis is "spline", which cannot be run yet; '
            "supported is one of hold, taylor, newton, hermite, fitted",
        ),
        (
            with_entry(FeatureEntry(site=replace(MLP, part="router"), step=3, action=REUSE)),
            'entries[0].site.part is "router", which cannot be run yet; '
            "supported is one of attention, attention_2, ",
        ),
        (
            replace(PLAN, gate=Gate(signal="curvature", threshold=0.1)),
            'gate.signal is "curvature", which cannot be run yet; '
            "supported is one of first_block, forecast, modulation, secant",
        ),
    ],
)
def test_check_runnable_refuses_feature_plans(plan: FeaturePlan, sentence: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_runnable(plan)
    assert str(caught.value).startswith(sentence)


def test_check_runnable_accepts_features() -> None:
    check_runnable(PLAN)
    check_runnable(replace(PLAN, gate=Gate(signal="secant", threshold=0.1), entries=()))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {"pipeline": "FluxPipeline", "steps": 4},
            "whose pipeline is PixArtAlphaPipeline, but that of small is FluxPipeline",
        ),
        (
            {"architecture": "Flux"},
            "whose architecture is PixArtTransformer2DModel, but that of small is Flux",
        ),
        (
            {"steps": 7, "sigmas": PLAN.model.sigmas[:8]},
            "whose number of steps is 8, but that of small is 7",
        ),
        (
            {"scheduler": '{"algorithm_type":"sde","class":"DPMSolverMultistepScheduler"}'},
            'whose scheduler setting algorithm_type is "dpmsolver++", but that of small is "sde"',
        ),
        (
            {"scheduler": PLAN.model.scheduler[:-1] + ',"shift":3.0}'},
            "whose scheduler setting shift is absent, but that of small is 3.0",
        ),
        ({"scheduler": "Euler"}, "whose scheduler setting algorithm_type is "),
        (
            {"sigmas": (14.6, 8.0, *PLAN.model.sigmas[2:])},
            "whose noise level 1 is 8.25, but that of small is 8.0",
        ),
        (
            {"call": PLAN.model.call.replace("4.5", "7.0")},
            "whose call setting guidance_scale is 4.5, but that of small is 7.0",
        ),
        (
            {"branches": ("cond", "uncond")},
            "whose list of branches is all, but that of small is cond, uncond",
        ),
        (
            {"expert_starts": (4,)},
            "whose change of denoiser is none, but that of small is 4",
        ),
        (
            {"latent": (4, 8, 8)},
            "whose shape of the latent is 4 x 16 x 16, but that of ",
        ),
        (
            {"blocks": PLAN.model.blocks[:2]},
            "whose number of blocks is 3, but that of small is 2",
        ),
        (
            {
                "blocks": (
                    replace(
                        PLAN.model.blocks[0],
                        parts=(Part(name="attention", path="attn", cost=0, size=0),),
                    ),
                    *PLAN.model.blocks[1:],
                )
            },
            "whose block 0 is transformer_blocks.0 attention:attn1 cross_attention:attn2 mlp:ff, "
            "but that of small is transformer_blocks.0 attention:attn",
        ),
        ({"digest": "sha256:0"}, "whose digest of configuration and weights is sha256:3f1c"),
    ],
)
def test_check_model_names_the_first_difference(changes: dict[str, Any], difference: str) -> None:
    with pytest.raises(ModelMismatchError) as caught:
        check_model(PLAN, replace(PLAN.model, id="small", **changes))
    assert str(caught.value).startswith(f"the plan was made for shapes-demo, {difference}")
    assert str(caught.value).endswith("load the plan's model or profile small and solve again")


def test_a_pipeline_may_go_by_another_name_and_be_counted_otherwise() -> None:
    check_model(PLAN, replace(PLAN.model, id="elsewhere/shapes-demo", cost=9000))


def test_families_do_not_mix() -> None:
    language = read_plan(Path(__file__).with_name("golden_plan.json"))
    with pytest.raises(ModelMismatchError, match="whose family is diffusion, but that of recall"):
        check_model(PLAN, language.model)
    with pytest.raises(ModelMismatchError, match="whose family is language, but that of shapes"):
        check_model(language, PLAN.model)
    assert kv_only(language, "verify") is language
    with pytest.raises(UnsupportedError, match="pipeline shapes-demo, which verify cannot follow"):
        kv_only(PLAN, "verify")
