"""What takes the place of a feature: combinations, corrections, and plans that are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cacheplan.adapters.taps import tapped
from cacheplan.errors import UnsupportedError
from cacheplan.runtime import apply
from cacheplan.runtime.features.store import Store, storage_bytes
from cacheplan.runtime.features.values import Forecast, Ready
from cacheplan.types import FeatureAction, FeatureEntry, FeaturePlan, FeatureSite

MakeEntry = Callable[..., FeatureEntry]
MakePlan = Callable[..., FeaturePlan]

PLAIN = FeatureAction(do="forecast", basis="taylor")


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 6, 4, 3), (2, 6, 2, 4, 3)])
def test_corrections_are_those_of_the_plan(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(6), torch.randn(6)
    action = FeatureAction(
        do="forecast",
        basis="taylor",
        shift=0.3,
        channel_scale=tuple(a.tolist()),
        channel_shift=tuple(b.tolist()),
    )
    features = [torch.randn(shape) for _ in range(2)]
    ones = [1] * (len(shape) - 3)
    if len(shape) > 3:
        a, b = a.view(6, 1, *ones), b.view(6, 1, *ones)
    weights = (2 * 1.5, 2 * -0.5)  # with the scale 2
    expected = a * (weights[0] * features[0] + weights[1] * features[1] + 0.3) + b
    forecast = Forecast(features, weights, action, {})
    torch.testing.assert_close(forecast.alone(), expected)
    base = torch.randn(shape)
    torch.testing.assert_close(forecast.added(base), expected + base)
    only_shift = FeatureAction(do="reuse", shift=0.3)
    value = Forecast(features[:1], (2.0,), only_shift, {}).alone()
    torch.testing.assert_close(value, 2 * features[0] + 0.3)


def test_channels_that_do_not_fit_are_refused() -> None:
    action = FeatureAction(do="reuse", channel_scale=(1.0, 2.0, 3.0))
    with pytest.raises(
        UnsupportedError, match="corrects 3 channels, but the feature has the shape"
    ):
        Forecast([torch.zeros(1, 5, 6)], (1.0,), action, {}).alone()


def test_any_number_of_features_can_be_combined() -> None:
    features = [torch.randn(2, 3, 4) for _ in range(7)]
    weights = tuple(torch.randn(7).tolist())
    expected = sum(w * f for w, f in zip(weights, features, strict=True))
    base = torch.randn(2, 3, 4)
    forecast = Forecast(features, weights, PLAIN, {})
    torch.testing.assert_close(forecast.alone(), expected)
    torch.testing.assert_close(forecast.added(base), expected + base)


def test_values_never_share_memory_with_what_is_kept() -> None:
    feature = (torch.randn(1, 3, 4), None)
    for value in (Forecast([feature], (1.0,), PLAIN, {}), Ready(feature)):
        tensor, nothing = value.alone()
        assert nothing is None
        assert torch.equal(tensor, feature[0])
        assert tensor.data_ptr() != feature[0].data_ptr()
        base = torch.randn(1, 3, 4)
        added, same = value.added((base, base))
        assert torch.equal(added, base + feature[0])
        assert same is base


def test_the_store_counts_each_storage_once() -> None:
    store, site = Store(), FeatureSite(part="mlp", first=0, last=1)
    both = torch.zeros(4, 6)
    assert storage_bytes((both[:2], both[2:], None)) == 96
    store.put(site, 0, 1, torch.zeros(8))
    store.put(site, 0, 3, (torch.zeros(4), None))
    store.put(site, 1, 3, torch.zeros(2))
    assert [step for step, _ in store.newest(site, 0)] == [3, 1]
    assert (store.bytes, store.peak) == (56, 56)
    store.trim(site, 0, 1)
    store.keep(lambda site, step: step > 3)
    assert (store.bytes, store.peak) == (0, 56)
    assert store.newest(site, 0) == []


def latents(model: Any, plan: FeaturePlan) -> Tensor:
    with apply(model.pipe, plan):
        result: Tensor = model.run()
    return result


def test_reuse_is_the_forecast_of_order_zero(
    family: Any, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    model = family("flux")
    steps = [(part, b, step) for part in ("attention", "mlp") for b in (0, 1) for step in (1, 2, 4)]

    def plan(**action: Any) -> FeaturePlan:
        entries = [entry(part, b, b + 1, step, **action) for part, b, step in steps]
        return feature_plan(model.spec, entries)

    reused = latents(model, plan())
    for basis in ("taylor", "newton", "hermite"):
        assert torch.equal(latents(model, plan(do="forecast", basis=basis)), reused)
    fitted = plan(do="forecast", basis="fitted", weights=(1.0,))
    assert torch.equal(latents(model, fitted), reused)


def test_the_delta_of_a_range_is_the_sum_of_its_blocks(
    family: Any, entry: MakeEntry, feature_plan: MakePlan, close: Callable[..., bool]
) -> None:
    for name in ("flux", "sd3"):
        model = family(name)
        one = feature_plan(model.spec, [entry("delta", 0, 3, step) for step in (1, 3)])
        each = feature_plan(
            model.spec, [entry("delta", b, b + 1, step) for b in range(3) for step in (1, 3)]
        )
        assert close(latents(model, each), latents(model, one))


def test_skipped_blocks_add_nothing(family: Any, entry: MakeEntry, feature_plan: MakePlan) -> None:
    model = family("wan")
    skipped = latents(model, feature_plan(model.spec, [entry("delta", 1, 2, 2, "skip")]))
    zero = latents(model, feature_plan(model.spec, [entry("delta", 1, 2, 2, scale=0.0)]))
    assert torch.equal(skipped, zero)


def test_a_part_is_replaced_by_its_corrected_forecast(
    family: Any, entry: MakeEntry, feature_plan: MakePlan, close: Callable[..., bool]
) -> None:
    """The same run, written out with a tap of its own."""
    model = family("wan")
    a, b = torch.rand(32) + 0.5, torch.randn(32) / 8
    corrected = {"channel_scale": tuple(a.tolist()), "channel_shift": tuple(b.tolist())}
    line = {"do": "forecast", "basis": "newton", "order": 1, "scale": 0.9, "shift": 0.05}
    plan = feature_plan(model.spec, [entry("mlp", 1, 2, 3, **line, **corrected)])
    s = model.spec.sigmas
    ahead = (s[3] - s[2]) / (s[2] - s[1])
    outputs: list[Tensor] = []  # of both branches, in turn

    def handler(inner: Any, args: Any, kwargs: Any) -> Tensor:
        output: Tensor = inner(*args, **kwargs)
        outputs.append(output)
        if len(outputs) in (7, 8):  # step 3
            newest, older = outputs[-3], outputs[-5]
            output = a * (0.9 * (newest + ahead * (newest - older)) + 0.05) + b
        return output

    with tapped(model.pipe.transformer, {"blocks.1.ffn": handler}):
        expected = model.run()
    assert not close(expected, model.full)
    assert close(latents(model, plan), expected)
