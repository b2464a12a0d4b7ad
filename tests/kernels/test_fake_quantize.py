"""Rounding to few bits against plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.kernels.fake_quantize.naive import on_grid, weights_on_grid

finite = st.floats(-100, 100, width=32)


def reference(x: Any, low: float, high: float, bits: int) -> Any:
    scale = max((high - low) / (2**bits - 1), 1e-12)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_rounded_like_the_reference(bits: int) -> None:
    x = 2 * torch.randn(30, 50, 7, dtype=torch.float64)
    low, high = torch.tensor(-1.3, dtype=torch.float64), torch.tensor(2.1, dtype=torch.float64)
    found = on_grid(x, low, high, bits)
    np.testing.assert_allclose(found, reference(x.numpy(), -1.3, 2.1, bits), atol=1e-12)
    assert len(np.unique(found)) == 2**bits


@settings(deadline=None)
@given(st.lists(finite, min_size=1, max_size=20), finite, finite, st.sampled_from([4, 8]))
def test_errors_within_the_range_are_half_a_scale(
    numbers: list[float], a: float, b: float, bits: int
) -> None:
    low, high = min(a, b, 0), max(a, b, 0)
    x = torch.tensor(numbers, dtype=torch.float64).clamp(low, high)
    ends = torch.tensor([low, high], dtype=torch.float64)
    found = on_grid(x, ends[0], ends[1], bits)
    scale = max((high - low) / (2**bits - 1), 1e-12)
    assert ((found - x).abs() <= scale * (1 + 1e-6)).all()  # of which half is from zero's place
    assert on_grid(torch.zeros(1), ends[0].float(), ends[1].float(), bits) == 0
    torch.testing.assert_close(on_grid(found, ends[0], ends[1], bits), found)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_take_the_best_of_forty_ranges(bits: int) -> None:
    weight = torch.randn(6, 40) ** 3  # long tails, so that clipping pays
    weight[1] = weight[1].abs()
    weight[2] = 0
    found = weights_on_grid(weight, bits)
    for row, own in zip(weight.double().numpy(), found.double().numpy(), strict=True):
        low, high = min(row.min(), 0), max(row.max(), 0)
        shares = [1 - i * 0.01 for i in range(0, 80, 2)]
        tried = [reference(row, share * low, share * high, bits) for share in shares]
        errors = [(np.abs(x - row) ** 2.4).mean() for x in tried]
        np.testing.assert_allclose(own, tried[int(np.argmin(errors))], atol=1e-5)
    assert not found[2].any()
    assert found.dtype == weight.dtype
    rest = ((found - weight) ** 2).mean()
    assert rest <= ((weights_on_grid(weight, 4) - weight) ** 2).mean()


def test_weights_of_half_precision_stay_so() -> None:
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    found = weights_on_grid(weight, 8)
    assert found.dtype == torch.bfloat16
    assert (found - weight).abs().max() < 0.05
