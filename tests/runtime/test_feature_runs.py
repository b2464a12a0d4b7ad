"""Whole runs of real pipelines under a plan: work done, memory, repeatability, restoration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cacheplan.adapters.calls import sample
from cacheplan.adapters.loop import denoisers, watching
from cacheplan.plans.compute import planned_flops
from cacheplan.plans.rules import PARTS
from cacheplan.runtime import apply
from cacheplan.types import FeatureEntry, FeaturePlan, FeatureSite

MakeEntry = Callable[..., FeatureEntry]
MakePlan = Callable[..., FeaturePlan]

FAMILIES = [
    "pixart", "flux", "flux2", "wan", "wan_experts", "sd3", "stable_diffusion", "cogvideox",
    "hunyuan_video", "ltx", "qwen_image", "sana", "dit",
]  # fmt: skip


def parts(family: Any, step: int, entry: MakeEntry, **action: Any) -> Iterator[FeatureEntry]:
    for b in family.blocks(step):
        for part in family.spec.blocks[b].parts:
            if part.name in PARTS:
                yield entry(part.name, b, b + 1, step, **action)


def mixed(family: Any, entry: MakeEntry) -> list[FeatureEntry]:
    """Every kind of site at one step or another."""
    L = len(family.spec.blocks)
    line = {"do": "forecast", "basis": "taylor", "order": 1}
    if family.unet:
        return [
            entry("branch", 1, L - 1, 1),
            entry("branch", 1, L - 1, 3, **line),
            entry("model", 0, L, 5, **line),
        ]
    late = 4 if family.spec.expert_starts else 3  # step 3 is the first of another denoiser
    own = family.blocks(2)
    return [
        *parts(family, 1, entry),
        entry("delta", own[1], own[1] + 1, 2),
        entry("mlp", own[0], own[0] + 1, 2, **line),
        entry("hidden", 0, L, late, **line),
        entry("model", 0, L, 5),
    ]


def snapshot(pipe: Any) -> list[Any]:
    """Everything that applying a plan may touch."""
    modules = [m for root in denoisers(pipe).values() for m in root.modules()]
    return [
        *((id(m), dict(m._modules), sorted(vars(m)), m._forward_hooks) for m in modules),
        sorted(vars(pipe.scheduler)),
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_of_all_kinds_does_the_work_it_promises(
    name: str, family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    model = family(name)
    plan = feature_plan(model.spec, mixed(model, entry))
    before = snapshot(model.pipe)
    with apply(model.pipe, plan) as report:
        flops, first = model.count()
        assert flops == planned_flops(plan) == report.flops
        assert torch.equal(first, model.run())
    assert report.runs == 2
    assert 0 < report.peak_bytes <= report.planned_bytes
    assert snapshot(model.pipe) == before
    assert not torch.equal(first, model.full)
    assert torch.equal(model.run(), model.full)
    everything = {entry.site: 0 for entry in plan.entries}
    for e in plan.entries:
        everything[e.site] += 1
    assert {site: count.skipped for site, count in report.sites.items()} == everything


@pytest.mark.parametrize("name", ["pixart", "flux", "wan_experts", "stable_diffusion"])
def test_an_empty_plan_gives_the_same_bits(name: str, family: Any, feature_plan: MakePlan) -> None:
    model = family(name)
    with apply(model.pipe, feature_plan(model.spec)) as report:
        assert torch.equal(model.run(), model.full)
    assert report.flops == report.full_flops
    assert report.peak_bytes == 0


@pytest.mark.parametrize("name", ["flux", "pixart", "wan", "sd3", "dit"])
def test_kept_features_take_the_memory_that_is_planned(
    name: str, family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    model = family(name)
    L = len(model.spec.blocks)
    line = {"do": "forecast", "basis": "newton", "order": 2}
    plans = [
        [entry("hidden", 0, L, 3, **line)],
        [entry("delta", 0, L, 3, **line)],
        [entry("model", 0, L, 3, **line)],
        list(parts(model, 3, entry, **line)),
    ]
    for entries in plans:
        with apply(model.pipe, feature_plan(model.spec, entries)) as report:
            model.run()
        if name == "sd3":  # its last block drops the text
            assert report.peak_bytes <= report.planned_bytes
        else:
            assert report.peak_bytes == report.planned_bytes


def test_a_run_that_was_broken_off_leaves_nothing_behind(
    family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    model = family("wan")
    plan = feature_plan(
        model.spec, [entry("delta", 1, 3, 2), entry("delta", 1, 3, 4), entry("mlp", 0, 1, 5)]
    )

    def interrupt(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return kwargs

    with apply(model.pipe, plan):
        expected = model.run()
        with pytest.raises(KeyboardInterrupt):
            model.run(seed=2, callback_on_step_end=interrupt)
        assert torch.equal(model.run(), expected)
    assert torch.equal(model.run(), model.full)


def test_taps_are_removed_after_an_error(
    family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    model = family("flux")
    before = snapshot(model.pipe)
    with (
        pytest.raises(ZeroDivisionError),
        apply(model.pipe, feature_plan(model.spec, [entry("hidden", 0, 4, 1)])),
    ):
        raise ZeroDivisionError
    assert snapshot(model.pipe) == before


def test_several_prompts_are_run_as_one(
    family: Any, entry: MakeEntry, feature_plan: MakePlan, close: Callable[..., bool]
) -> None:
    model = family("wan")
    plan = feature_plan(
        model.spec,
        [entry("mlp", 1, 2, 1), entry("hidden", 0, 3, 3), entry("model", 0, 3, 4)],
    )
    noise = torch.randn(2, *model.spec.latent)
    two = {
        name: torch.cat([value, value.flip(1)])
        for name, value in model.call.items()
        if isinstance(value, torch.Tensor)
    }
    with apply(model.pipe, plan) as report:
        both = model.run(latents=noise, **two)
        assert report.prompts == 2
        assert report.peak_bytes <= report.planned_bytes
        for i in range(2):
            one = {name: value[i : i + 1] for name, value in two.items()}
            assert close(both[i : i + 1], model.run(latents=noise[i : i + 1], **one), 1e-4)


def test_branches_keep_their_features_apart(
    family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    model = family("wan")
    deltas: dict[tuple[int, int], torch.Tensor] = {}

    def on_call(loop: Any, inner: Any, args: Any, kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        deltas[loop.step, loop.call] = sample(output) - kwargs["hidden_states"]
        return output

    plan = feature_plan(model.spec, [entry("model", 0, 3, 1), entry("model", 0, 3, 4)])
    with apply(model.pipe, plan), watching(model.pipe, on_call=on_call):
        model.run()
    for before, skipped in [(0, 1), (3, 4)]:
        for branch in (0, 1):
            kept, used = deltas[before, branch], deltas[skipped, branch]
            assert torch.allclose(kept, used, atol=1e-5)
            assert not torch.allclose(kept, deltas[skipped, 1 - branch], atol=1e-2)


def test_a_forward_that_others_have_replaced_is_called(
    family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    """Offloading replaces the forward of single modules."""
    model = family("wan")
    block = model.pipe.transformer.blocks[1]
    forward = block.forward
    calls: list[int] = []

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        return forward(*args, **kwargs)

    block.forward = hooked
    try:
        plan = feature_plan(model.spec, [entry("delta", 0, 2, 1), entry("attention", 1, 2, 3)])
        with apply(model.pipe, plan):
            model.run()
        assert len(calls) == 2 * 5
        assert block.forward is hooked
    finally:
        del block.forward


def test_inference_mode_and_tuples(family: Any, entry: MakeEntry, feature_plan: MakePlan) -> None:
    model = family("pixart")
    entries = [entry("attention", 0, 1, 1), entry("hidden", 0, 3, 2), entry("model", 0, 3, 3)]
    with apply(model.pipe, feature_plan(model.spec, entries)):
        expected = model.run()
        with torch.inference_mode():
            assert torch.equal(model.run(), expected)


def test_pixart_learns_variances_that_are_kept_as_they_are(
    family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    model = family("pixart")
    outputs = []

    def on_call(loop: Any, inner: Any, args: Any, kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        outputs.append((args[0], sample(output)))
        return output

    plan = feature_plan(model.spec, [entry("model", 0, 3, 1)])
    with apply(model.pipe, plan), watching(model.pipe, on_call=on_call):
        model.run()
    (x, computed), (y, skipped) = outputs[:2]
    assert skipped.shape == computed.shape == (2, 8, 8, 8)
    assert torch.equal(skipped[:, 4:], computed[:, 4:])
    assert torch.allclose(skipped[:, :4] - y, computed[:, :4] - x, atol=1e-5)


def test_two_sites_of_one_plan_may_share_blocks(
    family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    model = family("wan")
    sites = [("delta", 0, 2), ("delta", 0, 3), ("delta", 1, 3), ("hidden", 0, 3), ("mlp", 1, 2)]
    entries = [entry(*site, step) for step, site in enumerate(sites, start=1)]
    plan = feature_plan(model.spec, entries)
    with apply(model.pipe, plan) as report:
        assert model.count()[0] == planned_flops(plan)
    assert report.sites[FeatureSite(part="mlp", first=1, last=2)].computed == 1
