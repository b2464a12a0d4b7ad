"""The reference kernels against the textbook formulas, with the matrix they avoid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.kernels.column_sums.naive import column_sums
from cacheplan.kernels.ragged_attention.naive import ragged_attention


@pytest.mark.parametrize(("B", "K", "G", "T", "S", "D"), [(1, 1, 1, 1, 1, 4), (2, 3, 2, 17, 17, 8)])
@pytest.mark.parametrize("block", [1, 5, 64])
def test_column_sums(B: int, K: int, G: int, T: int, S: int, D: int, block: int) -> None:
    query, key = torch.randn(B, K * G, T, D), torch.randn(B, K, S, D)
    logits = query @ key.repeat_interleave(G, 1).transpose(-1, -2) * 0.3
    weights = logits.masked_fill(~torch.ones(T, S, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    expected = weights.sum(2).view(B, K, G, S).sum(2)
    found = column_sums(query, key, scale=0.3, block=block)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_column_sums_of_the_last_queries_only() -> None:
    query, key = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8)
    found = column_sums(query[:, :, -7:], key, scale=0.5)
    full = column_sums(query, key, scale=0.5)
    assert found.sum().item() == pytest.approx(7 * 2 * 2, rel=1e-5)
    early = torch.zeros_like(full)
    early[:, :, :23] = column_sums(query[:, :, :23], key[:, :, :23], scale=0.5)
    torch.testing.assert_close(found, full - early, atol=1e-5, rtol=1e-4)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    T=st.integers(1, 5),
    lengths=st.lists(st.integers(0, 40), min_size=6, max_size=6),
)
def test_ragged_attention(batch: int, heads: int, group: int, T: int, lengths: list[int]) -> None:
    D, rows = 8, batch * heads
    own = [T + n for n in lengths[:rows]]
    gaps = [3] * rows  # slack between rows, poisoned
    offsets = [sum(own[:r]) + sum(gaps[:r]) for r in range(rows)]
    keys = torch.full((sum(own) + sum(gaps), D), torch.nan, dtype=torch.float64)
    values = torch.full((sum(own) + sum(gaps), 2 * D), torch.nan, dtype=torch.float64)
    query = torch.randn(batch, heads * group, T, D, dtype=torch.float64)
    expected = torch.empty(batch, heads * group, T, 2 * D, dtype=torch.float64)
    for r, (offset, n) in enumerate(zip(offsets, own, strict=True)):
        keys[offset : offset + n] = torch.randn(n, D, dtype=torch.float64)
        values[offset : offset + n] = torch.randn(n, 2 * D, dtype=torch.float64)
        b, h = divmod(r, heads)
        for g in range(group):
            logits = query[b, h * group + g] @ keys[offset : offset + n].T * 0.25
            hidden = torch.ones(T, n, dtype=torch.bool).triu(n - T + 1)
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            expected[b, h * group + g] = weights @ values[offset : offset + n]
    found = ragged_attention(query, keys, values, offsets=offsets, lengths=own, scale=0.25)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
