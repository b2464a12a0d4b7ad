"""Moving tokens between caches and pools of ragged rows, in plain torch; all in place."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


@torch.no_grad()  # what is kept is no longer learned from
def gather(source: Tensor, kept: Tensor, ranges: Tensor, pool: Tensor, offsets: Tensor) -> None:
    """Copy the kept tokens of every row to its place in a pool.

    Row r of `source` `[R, S, D]` keeps the tokens `kept[ranges[r] : ranges[r + 1]]` (int32), which
    go to `pool` `[N, D]` from `offsets[r]` (int32 `[R]`) on.  Whatever else the pool holds stays.
    """
    assert_gathering(source, kept, ranges, pool, offsets)
    bounds, starts = ranges.tolist(), offsets.tolist()
    for r, ((first, end), start) in enumerate(zip(pairwise(bounds), starts, strict=True)):
        torch.index_select(source[r], 0, kept[first:end], out=pool[start : start + end - first])


def append(
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    *,
    offsets: Tensor,
    lengths: Tensor,
) -> None:
    """Write T tokens to the end of every row of two pools and add T to `lengths`.

    Row r occupies `lengths[r]` tokens from `offsets[r]` (int32 `[R]`) in `keys` `[N, D]` and
    `values` `[N, Dv]`; `new_keys` `[R, T, D]`, `new_values` `[R, T, Dv]`.  The caller sees to it
    that every row has slack for them: where each ends is known on the device alone.
    """
    assert_appending(keys, values, new_keys, new_values, offsets, lengths)
    T = new_keys.shape[1]
    place = (offsets + lengths)[:, None] + torch.arange(T, device=keys.device)
    keys[place] = new_keys
    values[place] = new_values
    lengths += T


def assert_gathering(
    source: Tensor, kept: Tensor, ranges: Tensor, pool: Tensor, offsets: Tensor
) -> None:
    """What every implementation relies on."""
    rows, _, D = source.shape
    assert pool.dim() == 2, pool.shape
    assert pool.shape[1] == D, (pool.shape, D)
    assert pool.dtype == source.dtype, (pool.dtype, source.dtype)
    assert ranges.shape == (rows + 1,), (ranges.shape, rows)
    assert offsets.shape == (rows,), (offsets.shape, rows)
    assert all(index.dtype == torch.int32 for index in (kept, ranges, offsets))


def assert_appending(
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    offsets: Tensor,
    lengths: Tensor,
) -> None:
    """What every implementation relies on."""
    rows = lengths.shape[0]
    assert offsets.shape == (rows,), offsets.shape
    assert offsets.dtype == lengths.dtype == torch.int32, (offsets.dtype, lengths.dtype)
    for pool, new in ((keys, new_keys), (values, new_values)):
        assert new.shape == (rows, new_keys.shape[1], pool.shape[1]), (new.shape, pool.shape)
        assert pool.dtype == new.dtype, (pool.dtype, new.dtype)
