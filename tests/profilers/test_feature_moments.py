"""Streaming moments against sums over everything at once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from cacheplan.profilers.feature_moments import LineErrors, Moments
from cacheplan.profilers.feature_observer import rows

T, M, C = 9, 5, 4


def features() -> Tensor:
    return torch.randn(T, M, C) + torch.linspace(0, 2, C)


def filled(values: Tensor, lags: int, steps: list[int]) -> Moments:
    moments = Moments(len(values), lags, channels=True)
    for step in steps:
        moments.add(step, values[step])
    return moments


@pytest.mark.parametrize("lags", [1, 3, T - 1])
@pytest.mark.parametrize("steps", [list(range(T)), [0, 1, 4, 5, 6, 8], [2, 3, 7]])
def test_moments_are_those_of_all_values(lags: int, steps: list[int]) -> None:
    values = features()
    F = values.double().numpy()
    moments = filled(values, lags, steps)
    gram, l1 = np.zeros((2, T, lags + 1))
    channel_gram, channel_mean = np.zeros((C, T, lags + 1)), np.zeros((C, T))
    ratio = np.ones(T)
    for t in steps:
        channel_mean[:, t] = F[t].mean(0)
        for lag in (t - s for s in steps if 0 <= t - s <= lags):
            gram[t, lag] = (F[t] * F[t - lag]).mean()
            l1[t, lag] = np.abs(F[t] - F[t - lag]).mean() if lag else np.abs(F[t]).mean()
            channel_gram[:, t, lag] = (F[t] * F[t - lag]).mean(0)
            if lag == 1:
                norms = np.linalg.norm(F[[t, t - 1]], axis=-1)
                ratio[t] = (norms[0] / norms[1]).mean()
    for found, expected in (
        (moments.gram, gram),
        (moments.l1, l1),
        (moments.token_ratio, ratio),
        (moments.channel_gram, channel_gram),
        (moments.channel_mean, channel_mean),
    ):
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lags", [1, 3, T - 1])
@pytest.mark.parametrize("steps", [list(range(T)), [0, 1, 4, 5, 6, 8]])
def test_lines_through_two_earlier_values(lags: int, steps: list[int]) -> None:
    values = features()
    F = values.double().numpy()
    found = LineErrors(T, lags)
    for step in steps:
        found.add(step, values[step])
    expected = np.zeros((T, lags + 1, lags + 1))
    for t in steps:
        expected[t, 0, 0] = np.abs(F[t]).mean()
        near = [s for s in steps if 0 < t - s <= lags]
        for j in near:
            expected[t, t - j, 0] = np.abs(F[j] - F[t]).mean()
            for i in (s for s in near if s < j):
                line = F[j] + (t - j) / (j - i) * (F[j] - F[i])
                expected[t, t - j, t - i] = np.abs(line - F[t]).mean()
    np.testing.assert_allclose(found.l1, expected, rtol=1e-5, atol=1e-6)
    assert len(found.recent) <= lags


def test_only_the_newest_values_stay() -> None:
    moments = Moments(T, 2, channels=True)
    for step, value in enumerate(features()):
        moments.add(step, value)
        assert len(moments.recent) == min(step + 1, 3)
    assert [step for step, _ in moments.recent] == [8, 7, 6]


def test_half_precision_is_widened() -> None:
    values = (300 * torch.ones(2, M, C)).half()  # the square overflows in half precision
    assert filled(values, 1, [0, 1]).gram[1].tolist() == [90000.0, 90000.0]


def test_rows_are_tokens_by_channels() -> None:
    hidden, text = torch.randn(2, 6, C), torch.randn(2, 3, C)
    assert torch.equal(rows([hidden, text], 99), torch.cat([hidden.view(-1, C), text.view(-1, C)]))
    other = torch.randn(2, 3, C + 1)
    assert torch.equal(rows([hidden, other], 99), hidden.view(-1, C))  # no channels in common
    picture = torch.randn(2, C, 3, 2)
    assert torch.equal(rows([picture], 99)[7], picture[1, :, 0, 1])
    chosen = rows([hidden], 5)
    assert chosen.shape == (5, C)
    places = [int((hidden.view(-1, C) == row).all(1).nonzero()) for row in chosen]
    assert all(a < b for a, b in pairwise(places))
    assert torch.equal(rows([hidden.clone()], 5), chosen)  # the same ones at every step
