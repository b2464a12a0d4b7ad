"""Column sums by the two passes of Triton against the naive version and the matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cacheplan.kernels.column_sums.naive import column_sums


@pytest.fixture(scope="module")
def triton_sums(interpreted_kernel: Callable[[str], Any]) -> Any:
    return interpreted_kernel("column_sums")


@pytest.fixture(autouse=True)
def _nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, **kw: empty(*s, **kw).fill_(torch.nan))


@pytest.mark.parametrize(
    ("B", "K", "G", "T", "S", "D"),
    [
        (1, 1, 1, 1, 1, 4),
        (2, 2, 2, 17, 17, 8),
        (1, 2, 3, 70, 300, 40),  # the last queries of a longer prompt
        (1, 1, 2, 200, 200, 16),
        (1, 2, 1, 64, 128, 128),  # whole tiles
        (1, 1, 4, 1, 129, 80),
    ],
)
def test_triton_is_naive(triton_sums: Any, B: int, K: int, G: int, T: int, S: int, D: int) -> None:
    query, key = torch.randn(B, K * G, T, D), torch.randn(B, K, S, D)
    expected = column_sums(query, key, scale=0.3)
    found = triton_sums.column_sums(query, key, scale=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.sum().item() == pytest.approx(B * K * G * T, rel=1e-5)
    half = triton_sums.column_sums(query.half(), key.half(), scale=0.3)
    torch.testing.assert_close(half, expected, rtol=1e-2, atol=1e-2)


def test_bfloat16_is_read_as_it_is(triton_sums: Any) -> None:
    query, key = torch.randn(1, 2, 9, 16).bfloat16(), torch.randn(1, 1, 30, 16).bfloat16()
    found = triton_sums.column_sums(query, key, scale=0.3, compute=torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, column_sums(query, key, scale=0.3), rtol=1e-5, atol=1e-5)


def test_large_logits(triton_sums: Any) -> None:
    query, key = torch.randn(1, 1, 40, 16) * 30, torch.randn(1, 1, 40, 16) * 30
    found = triton_sums.column_sums(query, key, scale=1.0)
    torch.testing.assert_close(found, column_sums(query, key, scale=1.0), rtol=1e-3, atol=1e-3)


def test_strided_inputs(triton_sums: Any) -> None:
    query = torch.randn(2, 9, 4, 16).transpose(1, 2)
    key = torch.randn(2, 30, 2, 16).transpose(1, 2)
    found = triton_sums.column_sums(query, key, scale=0.3)
    torch.testing.assert_close(found, column_sums(query, key, scale=0.3), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused(triton_sums: Any) -> None:
    query, key = torch.randn(1, 3, 5, 8), torch.randn(1, 2, 9, 8)
    with pytest.raises(AssertionError):
        triton_sums.column_sums(query, key, scale=1.0)
    with pytest.raises(AssertionError):
        triton_sums.column_sums(query[:, :2], key[:, :, :4], scale=1.0)
    with pytest.raises(AssertionError):
        triton_sums.column_sums(query[:, :2].double(), key.double(), scale=1.0)
