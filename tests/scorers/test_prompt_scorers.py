"""Scorers of a whole prompt against the papers' equations written out."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor

from cacheplan.errors import UnsupportedError
from cacheplan.scorers.expected import turned
from cacheplan.scorers.scores import Rotary, Seen, score
from cacheplan.scorers.selection import kept_tokens
from cacheplan.scorers.spectrum import high_frequencies
from cacheplan.types import (
    ExpectedAttention,
    KVAction,
    LagDifference,
    LowPassResidual,
    WindowAttention,
)

B, K, G, S, D = 2, 2, 3, 40, 8
QUERY, KEY, VALUE = torch.randn(B, K * G, S, D), torch.randn(B, K, S, D), torch.randn(B, K, S, D)
SEEN = Seen(QUERY, KEY, VALUE, 0.4)
LOGITS = QUERY @ KEY.repeat_interleave(G, 1).transpose(-1, -2) * 0.4
WEIGHTS = LOGITS.masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def pooled(x: Tensor, size: int) -> Tensor:
    padded = torch.nn.functional.pad(x, (size // 2, size // 2))
    return torch.stack([padded[..., i : i + S] for i in range(size)]).mean(0)


def test_tova_is_the_last_row_over_all_heads() -> None:
    action = KVAction(keep=0.5, scorer=WindowAttention(window=1, pool=1), share="layer")
    kept = kept_tokens(score(action.scorer, SEEN), [9] * K, action)
    best = WEIGHTS[:, :, -1].mean(1).topk(9).indices.sort().values  # [B, 9]
    for b in range(B):
        for h in range(K):
            assert torch.equal(kept[b * K + h], best[b])


def test_cake_adds_the_variance_over_the_window() -> None:
    found = score(WindowAttention(window=6, pool=3, variance=200.0), SEEN)
    rows = WEIGHTS[:, :, -6:]
    indicator = rows.mean(2) + 200 * ((rows - rows.mean(2, keepdim=True)) ** 2).sum(2) / 5
    torch.testing.assert_close(found, pooled(indicator.view(B, K, G, S).mean(2), 3))


def test_variance_of_a_single_query_is_nothing() -> None:
    one = score(WindowAttention(window=1, variance=200.0), SEEN)
    torch.testing.assert_close(one, score(WindowAttention(window=1), SEEN))


def test_value_norm_multiplies_the_attention() -> None:
    plain = score(WindowAttention(window=6), SEEN)
    found = score(WindowAttention(window=6, value_norm=True), SEEN)
    torch.testing.assert_close(found, plain * VALUE.abs().sum(-1))


def test_ranking_heads_choose_for_all_kv_heads() -> None:
    found = score(WindowAttention(window=6, pool=3, heads=(1, 4)), SEEN)
    expected = pooled(WEIGHTS[:, [1, 4], -6:].mean((1, 2)), 3)
    for h in range(K):
        torch.testing.assert_close(found[:, h], expected)


def test_all_heads_ranking_is_snapkv_with_one_set() -> None:
    plain = KVAction(keep=0.5, scorer=WindowAttention(window=8), recent=8, share="layer")
    every = replace(plain, scorer=WindowAttention(window=8, heads=tuple(range(K * G))))
    for one, other in zip(
        kept_tokens(score(plain.scorer, SEEN), [15] * K, plain),
        kept_tokens(score(every.scorer, SEEN), [15] * K, every),
        strict=True,
    ):
        assert torch.equal(one, other)


def rotation(position: float, rotary: Rotary, size: int) -> Tensor:
    """The matrix that rotates one vector of `size` channels, entry by entry."""
    matrix = torch.eye(size, dtype=torch.float64)
    R = len(rotary.frequencies)
    for i, frequency in enumerate(rotary.frequencies.tolist()):
        a, b = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + R)
        c, s = math.cos(position * frequency), math.sin(position * frequency)
        matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


ROTARIES = [
    Rotary(torch.tensor([1.0, 0.3, 0.1, 0.02])),
    Rotary(torch.tensor([1.0, 0.3, 0.1, 0.02]), interleaved=True),
    Rotary(torch.tensor([1.0, 0.1])),  # half of the channels
    Rotary(torch.tensor([])),  # none
]


@pytest.mark.parametrize("rotary", ROTARIES, ids=["halves", "neighbours", "partial", "none"])
@pytest.mark.parametrize("covariance", [True, False])
def test_expected_attention(rotary: Rotary, covariance: bool) -> None:
    skipped, future, start = 4, 9, 5
    scorer = ExpectedAttention(future=future, covariance=covariance, epsilon=0.01)
    plain, value = QUERY.double() + 0.5, VALUE.double()
    rotated = plain.clone()
    for t in range(S):
        rotated[:, :, t] = plain[:, :, t] @ rotation(start + t, rotary, D).T
    found = score(scorer, Seen(rotated.float(), KEY, VALUE, 0.4, start=start, rotary=rotary))
    ahead = [rotation(start + S + i, rotary, D) for i in range(future)]
    mean_rotation = torch.stack(ahead).mean(0)
    expected = torch.zeros(B, K, S, dtype=torch.float64)
    for b in range(B):
        for h in range(K * G):
            # start > skipped: all these queries lie behind the first tokens of the text
            queries = plain[b, h].numpy()
            mean = mean_rotation @ torch.from_numpy(queries.mean(0))
            spread = mean_rotation @ torch.from_numpy(np.cov(queries.T, bias=True))
            spread = spread @ mean_rotation.T
            keys = KEY[b, h // G, skipped:].double()
            z = 0.4 * keys @ mean
            if covariance:
                z = z + 0.4**2 / 2 * torch.stack([k @ spread @ k for k in keys])
            expected[b, h // G, skipped:] += z.softmax(0) / G
    expected = (expected + 0.01) * value.norm(dim=-1)
    torch.testing.assert_close(
        found[..., skipped:].double(), expected[..., skipped:], rtol=1e-4, atol=1e-6
    )
    assert (found[..., :skipped] > found[..., skipped:].amax(-1, keepdim=True)).all()


def test_expected_attention_leaves_out_the_first_queries() -> None:
    seen = replace(SEEN, rotary=ROTARIES[0])
    loud = QUERY.clone()
    loud[:, :, :4] *= 100
    found = score(ExpectedAttention(), replace(seen, query=loud))
    torch.testing.assert_close(found, score(ExpectedAttention(), seen))


def test_expected_attention_needs_the_rotation() -> None:
    with pytest.raises(UnsupportedError, match="rotary"):
        score(ExpectedAttention(), SEEN)


def test_turning_back_undoes_a_rotation() -> None:
    angle = torch.rand(S, 4)
    there = turned(QUERY, angle.cos(), angle.sin(), ROTARIES[0])
    torch.testing.assert_close(turned(there, angle.cos(), -angle.sin(), ROTARIES[0]), QUERY)
    torch.testing.assert_close(there.norm(dim=-1), QUERY.norm(dim=-1))


def test_lag_difference_ranks_within_stretches() -> None:
    lag, first = 8, 3
    found = score(LagDifference(lag=lag, skipped=first), SEEN)
    for b in range(B):
        for h in range(K):
            for part in range((S - first) // lag - 1):
                at = first + part * lag
                total = torch.zeros(lag)
                for x in (KEY[b, h], VALUE[b, h]):
                    following = x[at + lag : at + 2 * lag]
                    low, high = following.amin(0), following.amax(0)
                    total += ((x[at : at + lag] - low) / (high - low)).std(-1).softmax(0)
                ranks = total.argsort().argsort() / lag
                torch.testing.assert_close(found[b, h, at : at + lag], ranks)
    end = first + ((S - first) // lag - 1) * lag
    assert (found[..., end:] > 1).all()
    assert (found[..., end:].diff() > 0).all(), "the newest last"
    assert (found[..., :first] == 2).all()


def test_lag_difference_of_a_short_text_is_a_recent_window() -> None:
    found = score(LagDifference(lag=32, skipped=4), SEEN)
    assert (found[..., 4:].diff() > 0).all()


def test_lag_difference_survives_channels_without_range() -> None:
    seen = replace(SEEN, key=torch.ones_like(KEY), value=torch.ones_like(VALUE))
    assert score(LagDifference(lag=8), seen).isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 17, 40])
@pytest.mark.parametrize("passband", [0.0, 0.1, 0.35, 1.0])
def test_the_filter_is_a_cut_of_the_cosine_transform(length: int, passband: float) -> None:
    x = KEY[:, :, :length]
    cosines = scipy.fft.dct(x.double().numpy(), axis=-2, norm="ortho")
    cosines[..., : int(passband * length) + 1, :] = 0
    expected = torch.from_numpy(scipy.fft.idct(cosines, axis=-2, norm="ortho"))
    found = high_frequencies(x, passband)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    energy = float((cosines**2).sum())  # Parseval
    assert float(found.double().square().sum()) == pytest.approx(energy, rel=1e-5, abs=1e-8)


def test_a_spike_on_a_smooth_course_is_kept() -> None:
    time = torch.arange(S) + 0.5
    smooth = torch.cos(math.pi / S * 3 * time)[:, None] * torch.randn(D)
    key = smooth.expand(1, 1, S, D).clone()
    seen = Seen(torch.randn(1, 1, S, D), key, key, 1.0)
    assert score(LowPassResidual(), seen).max() < 1e-9, "three half waves pass"
    key[0, 0, 23] += 1
    assert score(LowPassResidual(), seen).argmax() == 23
