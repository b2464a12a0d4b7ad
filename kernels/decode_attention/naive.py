"""Attention of one query per sequence over ragged, partly quantised rows, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cacheplan.kernels.decode_attention.segments import Segment, assert_fitting, channel_count
from cacheplan.kernels.quantize.naive import dequantize
from cacheplan.kernels.quantize.packed import Packed


def decode_attention(
    query: Tensor,
    segments: Sequence[Segment],
    *,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend to all segments' tokens of a row as one; returns `[B, H, Dv]` of the query's dtype.

    `query` `[B, H, D]`; head h reads row `b * Hkv + h // (H / Hkv)`.  `sinks` `[H]` are logits that
    take part in the softmax without a value.  `softcap` c first makes logits c * tanh(logits / c)
    (Gemma 2, arXiv 2408.00118); bias and sinks come after it.  A row without tokens gives zeros.
    Computed in float64 if the query is, otherwise in float32.
    """
    assert_fitting(query, segments, sinks)
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    B, H, D = query.shape
    rows = segments[0].lengths.shape[0]
    group = B * H // rows
    folded = query.reshape(rows, group, D).to(exact)
    out = folded.new_zeros(rows, group, channel_count(segments[0].values))
    for r in range(rows):
        logits, values = [], []
        for segment in segments:
            n = int(segment.lengths[r])
            if n == 0:
                continue
            tokens = slice(int(segment.offsets[r]), int(segment.offsets[r]) + n)
            own = folded[r] @ _read(segment.keys, tokens, r, exact).T * scale
            if softcap is not None:
                own = softcap * torch.tanh(own / softcap)
            logits.append(own if segment.bias is None else own + segment.bias[tokens].to(exact))
            values.append(_read(segment.values, tokens, r, exact))
        if not logits:
            continue
        row = torch.cat(logits, -1)  # [group, tokens]
        if sinks is not None:
            own = sinks.to(exact).view(-1, group)[r % (H // group), :, None]
            row = torch.cat([row, own], -1)
        weights = row.softmax(-1)
        out[r] = (weights if sinks is None else weights[:, :-1]) @ torch.cat(values)
    return out.view(B, H, -1).to(query.dtype)


def _read(pool: Tensor | Packed, tokens: slice, row: int, dtype: torch.dtype) -> Tensor:
    """The tokens `[n, D]` of one row."""
    if not isinstance(pool, Packed):
        return pool[tokens].to(dtype)
    scales = tokens
    if pool.format.axis == "channel":
        group = pool.format.group
        assert group is not None
        assert tokens.start % group == 0 == tokens.stop % group, "groups are quantised whole"
        scales = slice(tokens.start // group, tokens.stop // group)
    part = replace(
        pool,
        codes=pool.codes[tokens],
        scale=pool.scale[scales],
        zero=None if pool.zero is None else pool.zero[scales],
        channel_scale=None if pool.channel_scale is None else pool.channel_scale[row],
    )
    return dequantize(part, dtype)
