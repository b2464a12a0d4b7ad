"""Column sums of causal attention by the fastest implementation that a device has."""

from __future__ import annotations

import torch
from torch import Tensor

from cacheplan.kernels import paths
from cacheplan.kernels.column_sums import naive

FEW = 128  # queries that plain torch reads in one block, over all keys at once
WIDEST = 512  # bytes of a query or key: tiles of wider ones exceed the memory of a multiprocessor


def path(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    queries: int = FEW + 1,
    channels: int = 1,
) -> paths.Name:
    """The implementation that `column_sums` takes.

    The kernels go through all keys for every tile of queries, one tile after the other: a few
    queries, as windows and decoding have them, would leave most of a GPU without work.
    """
    if queries <= FEW or channels * dtype.itemsize > WIDEST:
        return "naive"
    return paths.choose(device, dtype).name


def column_sums(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    """See `naive.column_sums`; products are exact in the wider of the two dtypes."""
    dtype = torch.promote_types(query.dtype, key.dtype)
    if path(query.device, dtype, *query.shape[2:]) == "naive":
        return naive.column_sums(query, key, scale=scale)
    from cacheplan.kernels.column_sums import triton

    return triton.column_sums(query, key, scale=scale, compute=dtype)
