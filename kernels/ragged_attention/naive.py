"""Attention over rows of unequal length, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    offsets: Sequence[int],
    lengths: Sequence[int],
    scale: float,
) -> Tensor:
    """Attend to one row of keys and values per (batch entry, kv head).

    `query` `[B, H, T, D]`; `keys` `[N, D]` and `values` `[N, Dv]` are pools in which row
    `b * K + h` occupies `lengths[r]` tokens from `offsets[r]`.  The last T tokens of every row
    are the queries' own, so query i sees all but the last T - 1 - i.  Returns `[B, H, T, Dv]`.

    The group's query heads are folded into the query length: keys are read once and never
    repeated, and a single-token step needs no mask.
    """
    B, H, T, D = query.shape
    rows = len(lengths)
    G = B * H // rows
    folded = query.reshape(rows, 1, G * T, D)
    out = query.new_empty(rows, G * T, values.shape[-1])
    for r, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        mask = None
        if T > 1:
            last = torch.arange(length - T, length, device=query.device)
            mask = (torch.arange(length, device=query.device) <= last[:, None]).repeat(G, 1)
        out[r] = scaled_dot_product_attention(
            folded[r : r + 1],
            keys[None, None, offset : offset + length],
            values[None, None, offset : offset + length],
            attn_mask=mask,
            scale=scale,
        )[0, 0]
    return out.view(B, H, T, -1)
