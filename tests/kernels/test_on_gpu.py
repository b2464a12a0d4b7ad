"""The Triton kernels as compiled, on a GPU; elsewhere these tests are skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cacheplan.adapters.attention import Step
from cacheplan.kernels.column_sums.naive import column_sums
from cacheplan.kernels.compact import naive as compact
from cacheplan.kernels.decode_attention.naive import decode_attention
from cacheplan.kernels.decode_attention.segments import Segment, divide
from cacheplan.kernels.quantize.naive import quantize
from cacheplan.kernels.quantize.packed import Format, Packed
from cacheplan.runtime.attending import attend
from cacheplan.runtime.rows import RaggedRows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FORMATS = [
    (Format("int8", "channel", 64), Format("int8", "token")),
    (Format("int4", "channel", 64), Format("int4", "token")),
    (Format("int4", "channel", 32), Format("int4", "token", separable=True)),
    (Format("int2", "channel", 64), Format("int2", "token", 64)),
    (Format("int2", "token", 64), Format("int2", "token", 32)),
    (Format("fp8", "token"), Format("fp8", "token")),
]


def on_gpu(source: Tensor | Packed | None) -> Any:
    if not isinstance(source, Packed):
        return None if source is None else source.cuda()
    names = ("codes", "scale", "zero", "channel_scale")
    return replace(source, **{name: on_gpu(getattr(source, name)) for name in names})


def moved(own: Segment) -> Segment:
    keys, values, bias = on_gpu(own.keys), on_gpu(own.values), on_gpu(own.bias)
    return Segment(keys, values, on_gpu(own.offsets), on_gpu(own.lengths), bias)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("pair", FORMATS, ids=lambda pair: f"{pair[0].number} {pair[0].axis}")
def test_quantize(compiled_kernel: Callable[[str], Any], pair: tuple[Format, Format]) -> None:
    x = (torch.randn(3, 512, 128) * torch.rand(128) * 3).bfloat16()
    for format in pair:
        found = compiled_kernel("quantize").quantize(x.cuda(), format)
        expected = quantize(x, format)
        for name in ("codes", "scale", "zero", "channel_scale"):
            own, other = getattr(found, name), getattr(expected, name)
            assert own is other is None or torch.equal(own.cpu(), other), name


@pytest.mark.parametrize("pair", [(None, None), *FORMATS], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decode_attention_in_a_graph(
    compiled_kernel: Callable[[str], Any], pair: Any, dtype: torch.dtype
) -> None:
    """Captured once, replayed after the latest tokens have grown in place."""
    module, old = compiled_kernel("decode_attention"), [640, 64, 1920, 320]
    keys, values = (torch.randn(sum(old), 128).to(dtype) for _ in range(2))
    starts = torch.tensor([0, 640, 704, 2624], dtype=torch.int32)
    key, value = pair
    packed: list[Any] = [
        keys if key is None else quantize(keys, key),
        values if value is None else quantize(values, value),
    ]
    if value is not None and value.separable:
        packed[1] = replace(packed[1], channel_scale=packed[1].channel_scale.expand(4, -1))
    bias = torch.rand(sum(old))
    first = Segment(packed[0], packed[1], starts, torch.tensor(old, dtype=torch.int32), bias)
    room = torch.arange(0, 400, 100, dtype=torch.int32)
    tail = [torch.randn(400, 128).to(dtype) for _ in range(2)]
    lengths = torch.tensor([1, 0, 50, 99], dtype=torch.int32)
    segments = [first, Segment(tail[0], tail[1], room, lengths)]
    query, sinks = torch.randn(2, 8, 128).to(dtype), torch.randn(8)
    work = divide([old, [100] * 4], processors=132, slots=32, device="cuda")
    given = [moved(own) for own in segments]
    arguments: Any = (query.cuda(), given, work)
    options: Any = {"scale": 0.09, "sinks": sinks.cuda(), "softcap": 20.0}
    module.decode_attention(*arguments, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = module.decode_attention(*arguments, **options)
    for grown in ([1, 0, 50, 99], [2, 1, 51, 100]):
        lengths.copy_(torch.tensor(grown))
        given[1].lengths.copy_(lengths)
        found.fill_(torch.nan)
        graph.replay()
        expected = decode_attention(query.double(), segments, scale=0.09, sinks=sinks, softcap=20.0)
        assert error(found, expected) < 5e-3


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_ragged_rows_of_a_layer(softcap: float | None) -> None:
    """Kept, appended to past their room and attended to by Triton, against the same on a CPU."""
    key, query = torch.randn(2, 2, 300, 128).bfloat16(), torch.randn(2, 8, 1, 128).bfloat16()
    kept = [torch.randperm(300)[:n].sort().values for n in (300, 7, 150, 1)]
    new, found = torch.randn(2, 2, 1, 128).bfloat16(), []
    for device in ("cpu", "cuda"):
        rows = RaggedRows(key.to(device), key.to(device))
        rows.keep([own.to(device) for own in kept])
        for _ in range(70):
            rows.append(new.to(device), new.to(device))
        module: Any = torch.nn.Identity()
        out, how = attend(rows, Step(module, query.to(device), 0.09, softcap=softcap))
        assert (how == "ragged attention in Triton") == (device == "cuda")
        found.append(out.cpu())
    assert error(found[1], found[0]) < 1e-2


def test_gather_and_append(compiled_kernel: Callable[[str], Any]) -> None:
    module = compiled_kernel("compact")
    source, kept = torch.randn(3, 900, 128).half(), [torch.arange(0, 900, s) for s in (1, 7, 30)]
    counts = [len(tokens) for tokens in kept]
    ranges = torch.tensor([0, *counts]).cumsum(0).int()
    offsets = torch.tensor([0, 1000, 2000], dtype=torch.int32)
    pools = [torch.zeros(2500, 128).half(), torch.zeros(2500, 128).half().cuda()]
    lengths = [torch.tensor(counts, dtype=torch.int32), torch.tensor(counts, dtype=torch.int32)]
    new = torch.randn(3, 2, 128).half()
    flat = torch.cat(kept).int()
    compact.gather(source, flat, ranges, pools[0], offsets)
    compact.append(pools[0], pools[0], new, new, offsets=offsets, lengths=lengths[0])
    device = [t.cuda() for t in (source, flat, ranges, offsets, new, lengths[1])]
    module.gather(device[0], device[1], device[2], pools[1], device[3])
    module.append(pools[1], pools[1], device[4], device[4], offsets=device[3], lengths=device[5])
    assert torch.equal(pools[0], pools[1].cpu())
    assert torch.equal(lengths[0], device[5].cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_column_sums(compiled_kernel: Callable[[str], Any], dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 8, 300, 128).to(dtype), torch.randn(2, 2, 1500, 128).to(dtype)
    found = compiled_kernel("column_sums").column_sums(query.cuda(), key.cuda(), scale=0.09)
    expected = column_sums(query, key, scale=0.09)
    assert error(found, expected) < (1e-5 if dtype == torch.float32 else 1e-2)
    again = compiled_kernel("column_sums").column_sums(query.cuda(), key.cuda(), scale=0.09)
    assert torch.equal(found, again)
