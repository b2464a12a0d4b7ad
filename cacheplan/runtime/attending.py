"""Attention over the rows of a layer, whatever they are stored in."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cacheplan.adapters.attention import Step
from cacheplan.kernels.decode_attention import cpu_int8, dispatch
from cacheplan.kernels.decode_attention.segments import Work, divide
from cacheplan.kernels.ragged_attention.naive import ragged_attention
from cacheplan.runtime.mixed import MixedRows
from cacheplan.runtime.rows import RaggedRows
from cacheplan.runtime.tiers import TieredRows


def attend(rows: RaggedRows | TieredRows | MixedRows, step: Step) -> tuple[Tensor, str]:
    """Attend to rows that hold the new tokens already; `[B, T, H, Dv]`, and how, in words."""
    if isinstance(rows, MixedRows):
        return _mixed(rows, step)
    single = step.query.shape[2] == 1 and step.valid is None and step.softcap is None
    int8 = rows.int8_rows() if isinstance(rows, TieredRows) and single else None
    if int8 is not None and step.sinks is None:
        query = step.query[:, :, 0].bfloat16()
        products = cpu_int8.decode_attention(query, int8, scale=step.scale)
        return products[:, None].to(step.query.dtype), "int8 products"
    if isinstance(rows, TieredRows) and single and int8 is None:
        found = dispatch.decode_attention(
            step.query[:, :, 0],
            rows.segments(),
            lambda: _work(rows),
            scale=step.scale,
            sinks=step.sinks,
        )
        words = "Triton" if dispatch.path(step.query.device) == "triton" else "plain torch"
        return found[:, None], f"packed attention in {words}"
    how = "unpacked SDPA" if isinstance(rows, TieredRows) else "ragged SDPA per head"
    if isinstance(rows, RaggedRows) and rows.rectangular:
        how = "SDPA over all rows"
    if step.valid is None:
        return _over(rows, range(rows.batch), step.query, step), how
    B, H, T, _ = step.query.shape
    parts = [
        _over(rows, range(b, b + 1), step.query[b : b + 1, :, tokens], step)[0]
        for b, tokens in enumerate(step.valid)
    ]
    out = step.query.new_zeros(B, T, H, parts[0].shape[-1])
    for b, tokens in enumerate(step.valid):
        out[b, tokens] = parts[b]
    return out, how


def _over(rows: RaggedRows | TieredRows, entries: range, query: Tensor, step: Step) -> Tensor:
    """Attention of some batch entries' queries `[b, H, t, D]`; returns `[b, t, H, Dv]`."""
    pattern = step.pattern
    if pattern is not None and step.valid is not None:
        own = step.valid[entries.start]
        pattern = pattern[entries.start : entries.stop, own][:, :, own]
    keys, values, offsets, lengths = rows.numbers(entries)
    return ragged_attention(
        query,
        keys,
        values,
        offsets=offsets,
        lengths=lengths,
        scale=step.scale,
        pattern=pattern,
        bias=rows.bias if isinstance(rows, RaggedRows) else None,
        sinks=step.sinks,
        softcap=step.softcap,
    ).transpose(1, 2)


def _mixed(rows: MixedRows, step: Step) -> tuple[Tensor, str]:
    """Each part's kv heads with the query heads that read them."""
    B, H, T, _ = step.query.shape
    group, found, ways = H // rows.heads, [], []
    for heads, part in rows.parts:
        queries = [h * group + g for h in heads for g in range(group)]
        sinks = None if step.sinks is None else step.sinks[queries]
        output, how = attend(part, replace(step, query=step.query[:, queries], sinks=sinks))
        found.append((queries, output))
        ways.append(how)
    out = step.query.new_zeros(B, T, H, found[0][1].shape[-1])
    for queries, output in found:
        out[:, :, queries] = output
    return out, " and ".join(dict.fromkeys(ways))


def _work(rows: TieredRows) -> Work:
    """How a GPU divides a step; it serves until the rows outgrow their room."""
    capacity = [*(tuple(tier.lengths) for tier in rows.tiers), tuple(rows.exact.capacity)]
    if rows.work is None or rows.work[0] != capacity:
        device = rows.exact.keys.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        rows.work = capacity, divide(capacity, processors=processors, device=device)
    return rows.work[1]
