"""Every kind of site on every family: put the true feature in place, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cacheplan.adapters.calls import latent, sample, unwrapped
from cacheplan.adapters.loop import denoisers, watching
from cacheplan.adapters.taps import tapped
from cacheplan.runtime.features.program import Program
from cacheplan.runtime.features.values import Forecast
from cacheplan.runtime.features.whole import join, split
from cacheplan.runtime.features.wiring import Wiring
from cacheplan.types import FeatureAction, FeatureEntry, FeaturePlan, FeatureSite

MakeEntry = Callable[..., FeatureEntry]
MakePlan = Callable[..., FeaturePlan]

FAMILIES = [
    "pixart", "flux", "flux2", "wan", "sd3", "sd35", "stable_diffusion", "cogvideox",
    "hunyuan_video", "ltx", "qwen_image", "sana", "dit",
]  # fmt: skip


def first_calls(family: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of the denoiser's calls in the first step."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    class Enough(Exception):  # noqa: N818
        pass

    def on_call(loop: Any, inner: Any, args: Any, kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return inner(*args, **kwargs)

    def on_step(loop: Any, inner: Any, args: Any, kwargs: Any) -> Any:
        raise Enough

    with watching(family.pipe, on_call=on_call, on_step=on_step), pytest.raises(Enough):
        family.run()
    return calls


def sites(family: Any) -> Iterator[FeatureSite]:
    L = len(family.spec.blocks)
    if family.unet:
        yield FeatureSite(part="branch", first=1, last=L - 1)
        return
    yield FeatureSite(part="hidden", first=0, last=L)
    end = 2 if family.name == "flux2" else L  # from there on text and picture are one stream
    yield FeatureSite(part="delta", first=0, last=end)
    yield FeatureSite(part="delta", first=L - 1, last=L)
    for b in (0, L - 1):
        for part in family.spec.blocks[b].parts:
            yield FeatureSite(part=part.name, first=b, last=b + 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_true_feature_in_its_place_changes_nothing(
    name: str, family: Any, entry: MakeEntry, feature_plan: MakePlan, close: Callable[..., bool]
) -> None:
    model = family(name)
    component, module = next(iter(denoisers(model.pipe).items()))
    calls = first_calls(model)
    full = [sample(module(*args, **kwargs)) for args, kwargs in calls]
    for (args, kwargs), expected in zip(calls, full, strict=True):
        given, output = latent(module, args, kwargs), module(*args, **kwargs)
        feature, form = split(output, given)
        value = Forecast([feature], (1.0,), FeatureAction(do="reuse"), {})
        assert close(sample(join(value, given, form)), expected)
    for site in sites(model):
        program = Program(feature_plan(model.spec, [entry(site.part, site.first, site.last, 1)]))
        wiring = Wiring(program, module, "", range(len(model.spec.blocks)))
        with tapped(unwrapped(module), wiring.handlers()):
            for (args, kwargs), expected in zip(calls, full, strict=True):
                wiring.set(0, no_value, promoted=False)
                wiring.observe()
                assert torch.equal(sample(module(*args, **kwargs)), expected)
                [(found, feature)] = wiring.collect()
                assert found == site
                wiring.observed = True
                value = Forecast([feature], (1.0,), program.actions[1][site], {})
                wiring.set(1, {site: value}.__getitem__, promoted=False)
                replaced = sample(module(*args, **kwargs))
                if site.part == "delta":  # x + (y - x) is y but for rounding
                    assert close(replaced, expected)
                else:
                    assert torch.equal(replaced, expected), site
        assert not list(wiring.collect()), component


def no_value(site: FeatureSite) -> Forecast:
    raise AssertionError(site)
