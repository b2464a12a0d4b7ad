"""Gathering and appending tokens in place: what is written, and that nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cacheplan.kernels.compact import naive

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(scope="module", params=["naive", "triton"])
def implementation(request: pytest.FixtureRequest, interpreted_kernel: Callable[[str], Any]) -> Any:
    return naive if request.param == "naive" else interpreted_kernel("compact")


def int32(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def same(found: Tensor, expected: Tensor) -> bool:
    """The same bits, and NaN where it was."""
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [1, 0, 50, 7], [50, 50, 50, 50]], ids=str)
@pytest.mark.parametrize("D", [8, 80])
def test_gather(implementation: Any, D: int, counts: list[int], dtype: torch.dtype) -> None:
    source = torch.randn(4, 50, D).to(dtype)
    kept = [torch.randperm(50)[:n].sort().values for n in counts]
    offsets = [3 + 60 * r for r in range(4)]
    target = torch.full((250, D), torch.nan, dtype=dtype)
    expected = target.clone()
    for start, row, tokens in zip(offsets, source, kept, strict=True):
        for i, token in enumerate(tokens.tolist()):
            expected[start + i] = row[token]
    ranges = int32([sum(counts[:r]) for r in range(5)])
    flat = torch.cat(kept).int()
    implementation.gather(source, flat, ranges, target, int32(offsets))
    assert same(target, expected)


def test_gather_from_a_view_of_a_cache(implementation: Any) -> None:
    """Rows `[B, Hkv, S, D]` whose tokens lie among others', as some caches store them."""
    cache = torch.randn(5, 40, 2, 24)
    source = cache.permute(0, 2, 1, 3)[0]  # [Hkv, S, D]
    target = torch.zeros(20, 24)
    implementation.gather(source, int32([1, 39, 0]), int32([0, 2, 3]), target, int32([0, 10]))
    assert torch.equal(target[:2], cache[0, [1, 39], 0])
    assert torch.equal(target[10], cache[0, 0, 1])
    assert not target[2:10].any()


def test_gather_knows_the_longest_row(interpreted_kernel: Callable[[str], Any]) -> None:
    source = torch.randn(2, 3000, 8)
    arguments = torch.arange(600).int(), int32([0, 600, 600]), int32([0, 600])
    targets = torch.zeros(2, 600, 8)
    naive.gather(source, arguments[0], arguments[1], targets[0], arguments[2])
    interpreted_kernel("compact").gather(
        source, arguments[0], arguments[1], targets[1], arguments[2], longest=600
    )
    assert torch.equal(targets[0], targets[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "DV"), [(8, 8), (20, 48)])
@pytest.mark.parametrize("T", [0, 1, 3])
def test_append(implementation: Any, T: int, D: int, DV: int, dtype: torch.dtype) -> None:
    keys = torch.full((100, D), torch.nan, dtype=dtype)
    values = torch.full((100, DV), torch.nan, dtype=dtype)
    offsets, before = [2, 20, 60], [0, 7, 30]
    lengths = int32(before)
    expected = [keys.clone(), values.clone()]
    for _ in range(2):
        new = torch.randn(3, T, D).to(dtype), torch.randn(3, T, DV).to(dtype)
        for r, (start, n) in enumerate(zip(offsets, lengths.tolist(), strict=True)):
            for one, tokens in zip(expected, new, strict=True):
                one[start + n : start + n + T] = tokens[r]
        implementation.append(keys, values, *new, offsets=int32(offsets), lengths=lengths)
    assert lengths.tolist() == [n + 2 * T for n in before]
    assert same(keys, expected[0])
    assert same(values, expected[1])


def test_what_does_not_fit_is_refused(implementation: Any) -> None:
    pool, new, index = torch.zeros(10, 8), torch.zeros(2, 1, 8), int32([0, 5])
    wrong: list[Any] = [
        (pool, pool, new.half(), new, index, index),
        (pool, pool, new, torch.zeros(2, 1, 9), index, index),
        (pool, pool, new, torch.zeros(2, 2, 8), index, index),
        (pool, pool, new, new, index.long(), index),
        (pool, pool, new, new, index, index[:1]),
    ]
    for keys, values, new_keys, new_values, offsets, lengths in wrong:
        with pytest.raises(AssertionError):
            implementation.append(
                keys, values, new_keys, new_values, offsets=offsets, lengths=lengths
            )
    with pytest.raises(AssertionError):
        implementation.gather(new, index, int32([0, 1]), pool, index)
