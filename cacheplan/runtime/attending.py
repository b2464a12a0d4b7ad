"""Attention over the rows of a layer, whatever they are stored in."""

from __future__ import annotations

from dataclasses import replace

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
    if step.query.shape[2] == 1 and step.valid is None:
        found = _single(rows, step)
        if found is not None:
            return found
    how = _words(rows, step)
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


def _single(rows: RaggedRows | TieredRows, step: Step) -> tuple[Tensor, str] | None:
    """One new token per text by a kernel for it; None where there is none that is better."""
    query, plain = step.query[:, :, 0], step.sinks is None and step.softcap is None
    if isinstance(rows, TieredRows) and (int8 := rows.int8_rows()) is not None:
        if not plain:
            return None
        products = cpu_int8.decode_attention(query.bfloat16(), int8, scale=step.scale)
        return products[:, None].to(query.dtype), "int8 products"
    segments = rows.segments()
    triton = dispatch.path(query, segments) == "triton"
    if isinstance(rows, RaggedRows) and (
        not triton  # on a CPU nothing beats a call for each row
        or (rows.rectangular and plain and rows.bias is None)  # one call reads all rows
    ):
        return None
    found = dispatch.decode_attention(
        query,
        segments,
        lambda: _work(rows),
        scale=step.scale,
        sinks=step.sinks,
        softcap=step.softcap,
    )
    kind = "ragged" if isinstance(rows, RaggedRows) else "packed"
    return found[:, None], f"{kind} attention in {'Triton' if triton else 'plain torch'}"


def _words(rows: RaggedRows | TieredRows, step: Step) -> str:
    """How `_over` attends."""
    way = "SDPA" if step.sinks is None and step.softcap is None else "plain torch"
    if isinstance(rows, TieredRows):
        return f"unpacked {way}"
    return f"{way} over all rows" if rows.rectangular else f"ragged {way} per head"


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
    B, H, T, D = step.query.shape
    group = H // rows.heads
    queries = step.query.view(B, rows.heads, group, T, D)
    sinks = None if step.sinks is None else step.sinks.view(rows.heads, group)
    out, ways = step.query.new_empty(0), dict[str, None]()
    for heads, (_, part) in zip(rows.places, rows.parts, strict=True):
        own = None if sinks is None else sinks[heads].flatten()
        found, how = attend(part, replace(step, query=queries[:, heads].flatten(1, 2), sinks=own))
        found = found.view(B, T, len(heads), group, -1)
        if not ways:
            out = found.new_empty(B, T, rows.heads, *found.shape[3:])
        out[:, :, heads] = found
        ways[how] = None
    return out.flatten(2, 3), " and ".join(ways)


def _work(rows: RaggedRows | TieredRows) -> Work:
    """How a GPU divides a step; it serves until the rows outgrow their room."""
    if rows.work is None or rows.work[0] != rows.room:
        device = rows.segments()[0].lengths.device
        count = dispatch.processors(device)
        rows.work = rows.room, divide(rows.room, processors=count, device=device)
    return rows.work[1]
