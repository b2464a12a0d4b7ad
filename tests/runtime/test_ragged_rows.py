"""Rows of unlike length against plain lists of tokens, and what the device is told of them."""

from __future__ import annotations

import torch
from torch import Tensor

from cacheplan.runtime.rows import RaggedRows

B, K, D = 2, 2, 4


def assert_same(rows: RaggedRows, expected: list[tuple[Tensor, Tensor]]) -> None:
    assert rows.bias is not None
    assert len(rows.lengths) == len(expected)
    for r, (tokens, bias) in enumerate(expected):
        assert torch.equal(rows.keys[rows.row(r)], tokens)
        assert torch.equal(rows.values[rows.row(r)], 2 * tokens)
        assert torch.equal(rows.bias[rows.row(r)], bias)
    assert rows.segment.offsets.tolist() == rows.offsets
    assert rows.segment.lengths.tolist() == rows.lengths
    assert all(n <= c for n, c in zip(rows.lengths, rows.capacity, strict=True))


def test_every_change_of_rows() -> None:
    key = torch.randn(B, K, 9, D)
    rows = RaggedRows(key, 2 * key)
    rows.bias = torch.rand(B * K * 9)
    kept = [torch.randperm(9)[:n].sort().values for n in (9, 2, 5, 1)]
    expected = [
        (key.flatten(0, 1)[r][own], rows.bias[rows.row(r)][own]) for r, own in enumerate(kept)
    ]
    rows.keep(kept)
    assert_same(rows, expected)
    some, none = torch.tensor([0, 2]), torch.tensor([], dtype=torch.long)
    for T, valid in ((1, None), (3, [some, some[:1]]), (70, None), (1, [some[:1], none])):
        new = torch.randn(B, K, T, D)
        longer = rows.extended(new, 2 * new, valid)
        assert_same(rows, expected)
        rows.append(new, 2 * new, valid)
        for r, (tokens, bias) in enumerate(expected):
            own = new[r // K, r % K] if valid is None else new[r // K, r % K][valid[r // K]]
            expected[r] = torch.cat([tokens, own]), torch.cat([bias, torch.zeros(len(own))])
        assert_same(rows, expected)
        assert_same(longer, expected)
    rows.drop_newest(4)
    expected = [(tokens[:-4], bias[:-4]) for tokens, bias in expected]
    assert_same(rows, expected)
    assert_same(rows.of_heads([1]), [expected[1], expected[3]])
    rows.drop_oldest([2, 1])
    expected = [
        (tokens[2 - r // K :], bias[2 - r // K :]) for r, (tokens, bias) in enumerate(expected)
    ]
    assert_same(rows, expected)
    rows.select([1, 0, 1])
    assert_same(rows, [expected[r] for r in (2, 3, 0, 1, 2, 3)])
