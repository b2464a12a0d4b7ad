"""Decode attention over int8 tokens on the CPU, where torch's int8 product is there and right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cacheplan.kernels.decode_attention import cpu_int8
from cacheplan.kernels.decode_attention.cpu_int8 import Int8Row, Int8Tokens, decode_attention
from cacheplan.kernels.decode_attention.cpu_int8 import quantize as quantized

needs_product = pytest.mark.skipif(not cpu_int8.available(), reason="torch has no int8 product")


def numbers(part: Int8Tokens) -> tuple[Tensor, Tensor]:
    keys = part.keys.double() * part.key_scale.double()[:, None]
    values = part.values.double() * part.value_scale.double()[:, None]
    return keys, values.T


def reference(query: Tensor, rows: list[Int8Row], scale: float) -> Tensor:
    folded = query.double().reshape(len(rows), -1, query.shape[-1])
    result = []
    for own, row in zip(folded, rows, strict=True):
        pairs = [*map(numbers, row.parts), (row.keys.double(), row.values.double())]
        keys, values = (torch.cat(side) for side in zip(*pairs, strict=True))
        result.append((own @ keys.T * scale).softmax(-1) @ values)
    return torch.stack(result).view(*query.shape[:2], -1)


def row(parts: list[int], tail: int, D: int, DV: int) -> Int8Row:
    made = [quantized(torch.randn(n, D), torch.randn(n, DV) + 1) for n in parts]
    latest = torch.randn(tail, D).bfloat16(), (torch.randn(tail, DV) + 1).bfloat16()
    return Int8Row(made, *latest)


@needs_product
@pytest.mark.parametrize(("D", "DV"), [(64, 64), (96, 40), (128, 128)])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_it_is_softmax_on_the_numbers(group: int, D: int, DV: int) -> None:
    rows = [row([256], 3, D, DV), row([512, 256], 0, D, DV), row([], 1, D, DV), row([], 40, D, DV)]
    query = torch.randn(2, 2 * group, D).bfloat16()
    found = decode_attention(query, rows, scale=D**-0.5)
    expected = reference(query, rows, D**-0.5)
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() / expected.norm() < 1e-2


@needs_product
def test_a_strong_token_is_found_in_every_part() -> None:
    for place in range(3):
        rows = [row([256, 256], 5, 64, 64)]
        query = torch.randn(1, 1, 64).bfloat16()
        if place < 2:
            keys, values = torch.randn(256, 64), torch.randn(256, 64)
            keys[100] = 5 * query[0, 0].float()
            parts = list(rows[0].parts)
            parts[place] = quantized(keys, values)
            rows = [Int8Row(parts, rows[0].keys, rows[0].values)]
            target = values[100]
        else:
            rows[0].keys[4] = 5 * query[0, 0]
            target = rows[0].values[4].float()
        found = decode_attention(query, rows, scale=1.0)
        torch.testing.assert_close(found[0, 0].float(), target, atol=5e-2, rtol=1e-2)


def test_codes_and_bytes() -> None:
    keys, values = torch.randn(512, 64).half() * 3, torch.randn(512, 96).half() - 2
    keys[7] = 0
    values[:, 5] = 0
    part = quantized(keys, values)
    for found, x, scale in zip(
        numbers(part), (keys, values), (part.key_scale[:, None], part.value_scale), strict=True
    ):
        # the scale is rounded to bfloat16, by which the largest code may fall short
        bound = scale.double() / 2 + x.double().abs().amax() * 2**-8
        assert ((found - x.double()).abs() <= bound).all()
    assert (numbers(part)[0][7] == 0).all()
    assert (numbers(part)[1][:, 5] == 0).all()
    assert part.nbytes == 512 * (64 + 96) + 2 * 512 + 2 * 96


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="take a multiple of 256 tokens and of 32 channels"):
        quantized(torch.randn(255, 64), torch.randn(255, 64))
    with pytest.raises(ValueError, match="take a multiple of 256 tokens and of 32 channels"):
        quantized(torch.randn(256, 40), torch.randn(256, 40))
    broken = torch.randn(256, 64)
    broken[3, 3] = torch.nan
    for pair in ((broken, broken.nan_to_num()), (broken.nan_to_num(), broken)):
        with pytest.raises(ValueError, match="finite"):
            quantized(*pair)


@pytest.fixture
def forgetful() -> None:
    cpu_int8.available.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_it_is_available_only_if_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: Tensor) -> Tensor:
        raise NotImplementedError

    for product in (None, refuses, lambda row, codes, scale: row @ codes.bfloat16().T):
        cpu_int8.available.cache_clear()
        monkeypatch.setattr(torch, "_weight_int8pack_mm", product)
        assert not cpu_int8.available()
    cpu_int8.available.cache_clear()
