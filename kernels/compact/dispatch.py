"""Moving tokens between caches and pools by the fastest implementation that a device has."""

from __future__ import annotations

import torch
from torch import Tensor

from cacheplan.kernels import paths
from cacheplan.kernels.compact import naive


def path(device: torch.device | str) -> paths.Name:
    """The implementation that `gather` and `append` take; they move numbers of any dtype."""
    return paths.choose(device).name


def gather(
    source: Tensor, kept: Tensor, ranges: Tensor, pool: Tensor, offsets: Tensor, *, longest: int
) -> None:
    """See `naive.gather`; no row keeps more than `longest` tokens."""
    if path(pool.device) == "naive":
        naive.gather(source, kept, ranges, pool, offsets)
        return
    from cacheplan.kernels.compact import triton

    triton.gather(source, kept, ranges, pool, offsets, longest=longest)


def append(
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    *,
    offsets: Tensor,
    lengths: Tensor,
) -> None:
    """See `naive.append`; in Triton one launch writes keys and values."""
    if path(keys.device) == "naive":
        naive.append(keys, values, new_keys, new_values, offsets=offsets, lengths=lengths)
        return
    from cacheplan.kernels.compact import triton

    triton.append(keys, values, new_keys, new_values, offsets=offsets, lengths=lengths)
