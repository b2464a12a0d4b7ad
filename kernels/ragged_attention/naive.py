"""Attention over rows of unequal length, in plain torch; on a CPU also the fast way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_BLOCK = 256  # queries of a head that attend together: bounds the mask


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    offsets: Sequence[int],
    lengths: Sequence[int],
    scale: float,
    pattern: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend to one row of keys and values per (batch entry, kv head).

    `query` `[B, H, T, D]`; `keys` `[N, D]` and `values` `[N, Dv]` are pools in which row
    `b * K + h` occupies `lengths[r]` tokens from `offsets[r]`.  The last T tokens of every row
    are the queries' own: among them query i sees the first i + 1, or what `pattern` `[B, T, T]`
    (bool) shows it; all older tokens are seen by all queries.  `bias` `[N]` is added to the
    logits of a token, and `sinks` `[H]` are logits that take part in the softmax without a value
    (gpt-oss, arXiv 2508.10925).  `softcap` c makes logits c * tanh(logits / c) before bias and
    sinks (Gemma 2, arXiv 2408.00118).  Returns `[B, H, T, Dv]`; rows without tokens give zeros.

    The group's query heads are folded into the query length: keys are read once and never
    repeated, and a single-token step needs no mask.  Rows of equal length in evenly spaced places
    go through in one call.
    """
    B, H, T, D = query.shape
    R = len(lengths)
    G = B * H // R
    folded = query.reshape(R, G, T, D)
    out = query.new_zeros(R, G, T, values.shape[-1])
    plain = sinks is None and softcap is None
    for first, rows in _bundles(offsets, lengths):
        length, offset = lengths[first], offsets[first]
        if length == 0:
            continue
        step = offsets[first + 1] - offset if rows > 1 else 0
        k = _rows(keys, rows, step, offset, length)
        v = _rows(values, rows, step, offset, length)
        if length == T and pattern is None and bias is None and plain:
            out[first : first + rows] = scaled_dot_product_attention(
                folded[first : first + rows],
                k[:, None].expand(-1, G, -1, -1),
                v[:, None].expand(-1, G, -1, -1),
                is_causal=True,
                scale=scale,
            )
            continue
        extra = None if bias is None else _rows(bias[:, None], rows, step, offset, length)[..., 0]
        for start in range(0, T, _BLOCK):
            part = folded[first : first + rows, :, start : start + _BLOCK]
            allowed = _allowed(first, rows, R // B, start, part.shape[2], T, length, pattern, query)
            mask = _mask(allowed, extra, G, part.shape[2], query.dtype)
            flat = part.reshape(rows, -1, D)
            if plain:
                found = scaled_dot_product_attention(
                    flat[:, None],
                    k[:, None],
                    v[:, None],
                    attn_mask=None if mask is None else mask[:, None],
                    scale=scale,
                )[:, 0]
            else:
                own = None
                if sinks is not None:  # [rows, G * t]
                    heads = torch.arange(first, first + rows, device=query.device) % (R // B)
                    own = sinks.view(-1, G)[heads].repeat_interleave(part.shape[2], 1)
                found = _explicit(flat, k, v, mask, scale, own, softcap)
            out[first : first + rows, :, start : start + _BLOCK] = found.view(*part.shape[:3], -1)
    return out.view(B, H, T, out.shape[-1])


def _bundles(offsets: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """All rows together (first, how many) if they are alike and evenly spaced, else one by one."""
    R = len(lengths)
    if R > 1 and len(set(lengths)) == 1:
        steps = {b - a for a, b in pairwise(offsets)}
        if len(steps) == 1:
            return [(0, R)]
    return [(r, 1) for r in range(R)]


def _rows(pool: Tensor, rows: int, step: int, offset: int, length: int) -> Tensor:
    """A view `[rows, length, D]` of the pool."""
    width = pool.shape[1]
    stride, at = pool.stride(0), pool.storage_offset() + offset * pool.stride(0)
    return pool.as_strided((rows, length, width), (step * stride, stride, pool.stride(1)), at)


def _allowed(
    first: int,
    rows: int,
    kv_heads: int,
    start: int,
    count: int,
    new: int,
    length: int,
    pattern: Tensor | None,
    query: Tensor,
) -> Tensor | None:
    """What the queries from `start` see, bool `[rows or 1, count, length]`; None: everything."""
    if pattern is not None:
        entry = torch.arange(first, first + rows, device=query.device) // kv_heads
        own = pattern[entry, start : start + count]
        return torch.cat([own.new_ones(rows, count, length - new), own], dim=-1)
    if new == 1:
        return None
    last = torch.arange(length - new + start, length - new + start + count, device=query.device)
    return (torch.arange(length, device=query.device) <= last[:, None])[None]


def _mask(
    allowed: Tensor | None, bias: Tensor | None, group: int, count: int, dtype: torch.dtype
) -> Tensor | None:
    """One mask for all folded queries `[rows or 1, group * count, length]`."""
    if bias is None:
        return None if allowed is None else allowed.repeat(1, group, 1)
    added = bias[:, None].to(dtype).expand(-1, count, -1)
    if allowed is not None:
        added = added.masked_fill(~allowed, float("-inf"))
    return added.repeat(1, group, 1)


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    logits = (query @ key.transpose(-1, -2)).float() * scale  # [rows, G * t, length]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        logits = logits + mask
    if sinks is None:
        return logits.softmax(-1).to(value.dtype) @ value
    most = torch.maximum(logits.amax(-1), sinks.float())[..., None]
    weights = (logits - most).exp()
    total = weights.sum(-1, keepdim=True) + (sinks.float()[..., None] - most).exp()
    return (weights / total).to(value.dtype) @ value
