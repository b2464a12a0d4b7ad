"""Corrections of output channels, and the plan's layers from a profile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cacheplan.errors import ProfileError
from cacheplan.recipes import FEATURE_RECIPES
from cacheplan.schedules.linears import linear_entries, output_fit
from cacheplan.types import RANGE_UNIT

Floats = NDArray[np.float64]
seeds = st.integers(0, 2**32 - 1)


def moments(q: Floats, truth: Floats) -> Floats:
    """`[C, 4]` from samples `[N, C]`."""
    e = truth - q
    return np.stack([x.mean(0) for x in (e, q, e * q, q * q)], axis=1)


def test_a_line_is_found_exactly() -> None:
    q = np.random.default_rng(0).normal(3, 2, (50, 4))
    slope, shift = output_fit(moments(q, 2 * q + 1))
    np.testing.assert_allclose(slope, 2, rtol=1e-12)
    np.testing.assert_allclose(shift, 1, rtol=1e-11)


@given(seeds, st.floats(0, 3), st.floats(-5, 5))
def test_the_correction_is_least_squares(seed: int, noise: float, mean: float) -> None:
    """Never worse than none, and as good as any other slope and intercept."""
    rng = np.random.default_rng(seed)
    q = rng.normal(mean, 1, (30, 3))
    truth = rng.normal(1, 0.2) * q + noise * rng.normal(size=q.shape)
    slope, shift = output_fit(moments(q, truth))
    error = ((slope * q + shift - truth) ** 2).mean(0)
    assert (error <= ((q - truth) ** 2).mean(0) + 1e-9).all()
    for c in range(3):
        best = np.polyfit(q[:, c], truth[:, c], 1)
        expected = ((np.polyval(best, q[:, c]) - truth[:, c]) ** 2).mean()
        assert error[c] == pytest.approx(expected, abs=1e-9)


def test_constants_are_moved_and_silence_stays() -> None:
    q = np.stack([np.full(10, 3.0), np.zeros(10)], axis=1)
    slope, shift = output_fit(moments(q, np.array([3.5, 0.0]) + 0 * q))
    np.testing.assert_array_equal(slope, 1)
    np.testing.assert_allclose(shift, [0.5, 0], atol=1e-12)


def test_layers_of_a_plan(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(8, 2)
    entries = linear_entries(profile, FEATURE_RECIPES["cachequant_w4a8"])
    assert [e.path for e in entries] == ["blocks.0.mlp", "proj_out"]  # one never runs
    assert [e.action.weight.bits for e in entries] == [4, 8]  # the last layer keeps 8
    assert {e.action.activation.bits for e in entries} == {8}
    ranges = profile.statistics["activation_range"].mean[0] * RANGE_UNIT
    np.testing.assert_allclose(entries[0].ranges, ranges, rtol=1e-5)
    spread = np.full((3, 8, 2), 0.001)
    known = replace(profile.statistics["activation_range"], std=spread)
    wide = replace(profile, statistics={**profile.statistics, "activation_range": known})
    entries = linear_entries(wide, FEATURE_RECIPES["cachequant_w8a8"])
    ends = np.array([-1, 1]) * 3 * 0.001 * RANGE_UNIT  # three standard deviations on each side
    np.testing.assert_allclose(entries[0].ranges, ranges + ends, rtol=1e-5)
    entries = linear_entries(profile, FEATURE_RECIPES["cachequant_w4a8"])
    assert not entries[0].channel_scale
    table = profile.statistics["reader_moments"].mean  # [C, T, 4]
    slope, shift = output_fit(table)
    np.testing.assert_allclose(np.transpose(entries[1].channel_scale), slope, atol=1e-6)
    np.testing.assert_allclose(np.transpose(entries[1].channel_shift), shift * 256, atol=1e-6)
    assert linear_entries(profile, FEATURE_RECIPES["cachequant"]) == ()


def test_profiles_without_ranges_are_refused(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(8, 2)
    known = {k: v for k, v in profile.statistics.items() if k != "activation_range"}
    with pytest.raises(ProfileError, match=r'no statistic "activation_range": run .* again\.'):
        linear_entries(replace(profile, statistics=known), FEATURE_RECIPES["cachequant_w8a8"])
