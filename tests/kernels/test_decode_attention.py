"""Decode attention: naive against textbook loops, Triton against naive, on pools full of NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cacheplan.kernels.decode_attention.naive import decode_attention
from cacheplan.kernels.decode_attention.segments import Segment, Work, divide
from cacheplan.kernels.quantize.naive import dequantize, quantize
from cacheplan.kernels.quantize.packed import Format, Packed

SLACK = 64  # before and after every row, and a multiple of every group
LENGTHS = [0, 64, 192, 320]
TAILS = [1, 70, 0, 3]


def keys(number: Any, group: int = 64) -> Format:
    return Format(number, "channel", group)


def values(number: Any, group: int | None = None) -> Format:
    return Format(number, "token", group)


SEPARABLE = Format("int4", "token", separable=True)
FP8 = Format("fp8", "token")


@pytest.fixture(scope="module")
def triton_decode(interpreted_kernel: Callable[[str], Any]) -> Any:
    return interpreted_kernel("decode_attention")


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so that what is read before it is written shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, **kw: empty(*s, **kw).fill_(torch.nan))


def places(lengths: Sequence[int]) -> list[int]:
    found, at = [], SLACK
    for n in lengths:
        found.append(at)
        at += SLACK * -(-n // SLACK) + SLACK
    return found


def pool(rows: Sequence[Tensor], format: Format | None = None) -> Tensor | Packed:
    """Rows `[n, D]` with NaN around them, or with codes and scales that are NaN."""
    lengths, D = [len(row) for row in rows], rows[0].shape[1]
    N = places([*lengths, 0])[-1]
    if format is None:
        plain = torch.full((N, D), torch.nan, dtype=rows[0].dtype)
        for start, row in zip(places(lengths), rows, strict=True):
            plain[start : start + len(row)] = row
        return plain
    step = format.group if format.axis == "channel" else None
    groups = 1 if format.group is None else D // format.group
    shape = (N // step, D) if step else (N, groups)
    codes = torch.full((N, D // format.planes), 0x7F, dtype=torch.uint8)  # NaN in fp8
    scale = torch.full(shape, torch.nan, dtype=torch.float16)
    zero = None if format.number == "fp8" else scale.clone()
    by = torch.full((len(rows), D), torch.nan, dtype=torch.float16) if format.separable else None
    for r, (start, row) in enumerate(zip(places(lengths), rows, strict=True)):
        if len(row) == 0:
            continue
        own = quantize(row, format)
        codes[start : start + len(row)] = own.codes
        at = slice(start // (step or 1), (start + len(row)) // (step or 1))
        scale[at] = own.scale
        if zero is not None and own.zero is not None:
            zero[at] = own.zero
        if by is not None and own.channel_scale is not None:
            by[r] = own.channel_scale
    return Packed(codes, scale, zero, by, format)


def int32(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def segment(
    lengths: Sequence[int],
    D: int,
    DV: int,
    *,
    key: Format | None = None,
    value: Format | None = None,
    bias: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Segment:
    """Random rows: keys with channels of unlike size and place."""
    own_keys = [(torch.randn(n, D) * torch.rand(D) * 2 + torch.randn(D)).to(dtype) for n in lengths]
    own_values = [(torch.randn(n, DV) + torch.randn(DV)).to(dtype) for n in lengths]
    logits = pool([torch.rand(n, 1) * 3 for n in lengths])
    assert isinstance(logits, Tensor)
    return Segment(
        pool(own_keys, key),
        pool(own_values, value),
        int32(places(lengths)),
        int32(lengths),
        logits[:, 0].contiguous() if bias else None,
    )


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def numbers_of(source: Tensor | Packed, start: int, stop: int, row: int) -> Tensor:
    """By whole-pool dequantisation, unlike the naive version."""
    if not isinstance(source, Packed):
        return source[start:stop].double()
    plain = Packed(source.codes, source.scale, source.zero, None, source.format)
    found = dequantize(plain, torch.float64)[start:stop]
    return found if source.channel_scale is None else found * source.channel_scale[row].double()


def textbook(
    query: Tensor,
    segments: Sequence[Segment],
    scale: float,
    sinks: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    """One exponential at a time."""
    B, H, _ = query.shape
    heads = len(segments[0].lengths) // B
    result = []
    for b in range(B):
        for h in range(H):
            r = b * heads + h // (H // heads)
            total = 0.0 if sinks is None else math.exp(sinks[h].item())
            weighted: Tensor | float = 0.0
            for own in segments:
                start = int(own.offsets[r])
                stop = start + int(own.lengths[r])
                k = numbers_of(own.keys, start, stop, r)
                v = numbers_of(own.values, start, stop, r)
                for t in range(stop - start):
                    logit = scale * float(query[b, h].double() @ k[t])
                    logit = logit if softcap is None else softcap * math.tanh(logit / softcap)
                    logit += 0.0 if own.bias is None else own.bias[start + t].item()
                    total += math.exp(logit)
                    weighted = weighted + math.exp(logit) * v[t]
            result.append(weighted / total)
    return torch.stack([torch.as_tensor(row) for row in result]).view(B, H, -1)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    B=st.integers(1, 2),
    group=st.integers(1, 8),
    key=st.sampled_from([None, keys("int4"), values("int2", 4), FP8]),
    value=st.sampled_from([None, values("int8", 3), SEPARABLE, FP8]),
    tails=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    sinks=st.booleans(),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 0.7]),
)
def test_naive_is_the_textbook(
    B: int,
    group: int,
    key: Format | None,
    value: Format | None,
    tails: list[int],
    sinks: bool,
    bias: bool,
    softcap: float | None,
) -> None:
    rows = 2 * B
    old = segment([64, 0, 64, 64][:rows], 8, 12, key=key, value=value, bias=bias)
    new = segment(tails[:rows], 8, 12)
    query = torch.randn(B, 2 * group, 8, dtype=torch.float64)
    extra = torch.randn(2 * group) if sinks else None
    found = decode_attention(query, [old, new], scale=0.4, sinks=extra, softcap=softcap)
    torch.testing.assert_close(found, textbook(query, [old, new], 0.4, extra, softcap))


CASES = [
    pytest.param(None, None, {}, id="16 bit"),
    pytest.param(keys("int8"), values("int8"), {}, id="int8"),
    pytest.param(keys("int4"), values("int4"), {}, id="int4"),
    pytest.param(keys("int2"), values("int2"), {}, id="int2"),
    pytest.param(FP8, FP8, {}, id="fp8"),
    pytest.param(keys("int4", 32), values("int2", 32), {"sinks": True}, id="groups of 32"),
    pytest.param(keys("int2", 16), SEPARABLE, {"bias": True}, id="separable"),
    pytest.param(values("int2", 32), values("int2", 16), {"bias": True}, id="per token"),
    pytest.param(None, values("int4"), {"sinks": True}, id="values only"),
    pytest.param(keys("int4"), None, {}, id="keys only"),
    pytest.param(None, None, {"softcap": 1.5, "bias": True}, id="soft cap of 16 bit"),
    pytest.param(keys("int4"), values("int4"), {"softcap": 30.0, "sinks": True}, id="soft cap"),
]


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("compute", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("key", "value", "extras"), CASES)
def test_triton_is_naive(
    triton_decode: Any,
    key: Format | None,
    value: Format | None,
    extras: dict[str, Any],
    compute: torch.dtype,
) -> None:
    old = segment(LENGTHS, 64, 64, key=key, value=value, bias=extras.get("bias", False))
    segments = [old, segment(TAILS, 64, 64)]
    query = torch.randn(2, 8, 64).to(compute) * 2
    sinks = torch.randn(8) if extras.get("sinks") else None
    work = divide([LENGTHS, TAILS], processors=1, chunk=128)
    options: Any = {"scale": 0.125, "sinks": sinks, "softcap": extras.get("softcap")}
    found = triton_decode.decode_attention(query, segments, work, **options, compute=compute)
    expected = decode_attention(query.double(), segments, **options)
    assert found.dtype == compute
    assert error(found, expected) < (2e-6 if compute == torch.float32 else 2e-3)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("group", range(1, 9))
def test_triton_for_every_group_of_heads(triton_decode: Any, group: int) -> None:
    segments = [segment([64, 0], 16, 16, key=keys("int4"), value=values("int4"))]
    segments.append(segment([1, 3], 16, 16))
    query, sinks = torch.randn(1, 2 * group, 16), torch.randn(2 * group)
    work = divide([[64, 0], [1, 3]], processors=4)
    found = triton_decode.decode_attention(
        query, segments, work, scale=0.3, sinks=sinks, compute=torch.float32
    )
    assert error(found, decode_attention(query.double(), segments, scale=0.3, sinks=sinks)) < 2e-6


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("D", "DV"), [(80, 48), (20, 100), (8, 8), (128, 256)])
def test_triton_at_odd_sizes(triton_decode: Any, D: int, DV: int, dtype: torch.dtype) -> None:
    lengths = [1, 65, 130]
    own = segment(lengths, D, DV, dtype=dtype)
    query = torch.randn(3, 3, D).to(dtype).float()
    work = divide([lengths], processors=1, chunk=128)
    found = triton_decode.decode_attention(query, [own], work, scale=0.2, compute=torch.float32)
    assert error(found, decode_attention(query.double(), [own], scale=0.2)) < 2e-6


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("number", ["int8", "int4", "int2"])
def test_triton_at_odd_packed_sizes(triton_decode: Any, number: str) -> None:
    own = segment([64, 128], 80, 48, key=keys(number), value=values(number))
    query = torch.randn(1, 6, 80)
    work = divide([[64, 128]], processors=1, chunk=128)
    found = triton_decode.decode_attention(query, [own], work, scale=0.2, compute=torch.float32)
    assert error(found, decode_attention(query.double(), [own], scale=0.2)) < 2e-6


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("sinks", [None, torch.tensor([-3.0, 0.0, 50.0, 1.0])])
def test_rows_without_tokens_are_zero(triton_decode: Any, sinks: Tensor | None) -> None:
    own = segment([0, 5], 16, 16)
    query = torch.randn(1, 4, 16)
    expected = decode_attention(query.double(), [own], scale=1.0, sinks=sinks)
    for lengths in ([0, 5], [64, 64]):  # with items of empty rows, and without
        work = divide([lengths], processors=1)
        found = triton_decode.decode_attention(
            query, [own], work, scale=1.0, sinks=sinks, compute=torch.float32
        )
        assert (found[:, :2] == 0).all()
        torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-5)
    assert (expected[:, :2] == 0).all()


@pytest.mark.usefixtures("nan_memory")
def test_one_division_serves_while_rows_grow(triton_decode: Any) -> None:
    """What a captured CUDA graph relies on: only the lengths, in place, change."""
    own = segment([130, 200], 16, 16)
    query = torch.randn(1, 2, 16)
    work = divide([[192, 256]], processors=1, chunk=128, slots=9)
    for lengths in ([1, 0], [127, 128], [128, 129], [130, 200]):
        own.lengths.copy_(int32(lengths))
        found = triton_decode.decode_attention(query, [own], work, scale=0.5, compute=torch.float32)
        expected = decode_attention(query.double(), [own], scale=0.5)
        torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-4)


@pytest.mark.usefixtures("nan_memory")
def test_a_merged_token_counts_as_its_many(triton_decode: Any) -> None:
    """The bias log n: one key and value in the place of n equal ones."""
    row, value, query = torch.randn(1, 16), torch.randn(1, 16), torch.randn(1, 1, 16)
    other = torch.randn(2, 2, 16)

    def own(times: int, bias: list[float]) -> Segment:
        k = torch.cat([row.expand(times, -1), other[0]])
        v = torch.cat([value.expand(times, -1), other[1]])
        return Segment(k.contiguous(), v, int32([0]), int32([len(k)]), torch.tensor(bias))

    merged, many = own(1, [math.log(5), 0, 0]), own(5, [0.0] * 7)
    work = divide([[7]], processors=1)
    first = triton_decode.decode_attention(query, [merged], work, scale=0.3)
    for found in (
        triton_decode.decode_attention(query, [many], work, scale=0.3),
        decode_attention(query, [merged], scale=0.3),
        decode_attention(query, [many], scale=0.3),
    ):
        torch.testing.assert_close(found, first)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("size", [1e-3, 100.0])
def test_large_logits_and_small_scales(triton_decode: Any, size: float) -> None:
    """Logits of several hundred, and values whose scales are no normal float16 numbers."""
    own_keys = [(torch.randn(192, 16) * 30).half()]
    own_values = [(torch.randn(192, 16) * size).half()]
    packed = pool(own_keys, keys("int8")), pool(own_values, values("int8"))
    own = Segment(*packed, int32([SLACK]), int32([192]))
    query = (torch.randn(1, 2, 16) * 20).half()
    work = divide([[192]], processors=1, chunk=128)
    for scale in (1.0, 1e-3):
        found = triton_decode.decode_attention(query.float(), [own], work, scale=scale)
        expected = decode_attention(query.double(), [own], scale=scale)
        assert error(found, expected) < 3e-3


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    lengths=st.lists(
        st.lists(st.integers(0, 3000), min_size=3, max_size=3), min_size=1, max_size=3
    ),
    processors=st.integers(1, 150),
    spare=st.integers(0, 5),
)
def test_work_covers_every_token_once(
    lengths: list[list[int]], processors: int, spare: int
) -> None:
    tight = divide(lengths, processors=processors)
    work = divide(lengths, processors=processors, slots=tight.slots + spare)
    assert [len(items) for items in work.items] == [work.slots] * len(lengths)
    used: list[int] = []
    for own, items in zip(lengths, work.items, strict=True):
        found: list[list[range]] = [[] for _ in own]
        real = [item for item in items.tolist() if item[0] >= 0]
        sizes = [end - start for _, start, end, _ in real]
        assert sizes == sorted(sizes, reverse=True)
        for row, start, end, slot in real:
            assert start % 128 == 0
            assert start < end
            assert work.ranges[row] <= slot < work.ranges[row + 1]
            found[row].append(range(start, end))
            used.append(slot)
        for n, chunks in zip(own, found, strict=True):
            assert sorted(t for chunk in chunks for t in chunk) == list(range(n))
    assert sorted(used) == list(range(tight.slots))


def test_work_is_divided_among_processors() -> None:
    assert 1.5 * 132 <= divide([[131072] * 8], processors=132).slots <= 2 * 132 + 8
    assert divide([[300] * 64], processors=132).slots == 128  # none for few tokens but the last


def test_work_is_overwritten_in_place() -> None:
    lengths = [[300, 10]]
    work = divide([[100, 600]], processors=1, chunk=128, slots=8)
    tensors = *work.items, work.ranges
    work.copy_(other := divide(lengths, processors=1, chunk=128, slots=8))
    assert all(a is b for a, b in zip((*work.items, work.ranges), tensors, strict=True))
    assert torch.equal(work.items[0], other.items[0])
    assert torch.equal(work.ranges, other.ranges)
    with pytest.raises(ValueError, match="need 4 slots; 3 are too few"):
        divide(lengths, processors=1, chunk=128, slots=3)
    with pytest.raises(AssertionError):
        work.copy_(divide(lengths, processors=1, chunk=128))


def test_what_cannot_be_decoded_is_refused(triton_decode: Any) -> None:
    query, work = torch.randn(1, 2, 32), divide([[64]], processors=1)

    def run(key: Format | None, value: Format | None) -> None:
        own = segment([64], 32, 32, key=key, value=value)
        triton_decode.decode_attention(query, [own], work, scale=1.0)

    with pytest.raises(ValueError, match="take axis 'token'"):
        run(keys("int4"), keys("int4"))
    with pytest.raises(ValueError, match="take a multiple of 16"):
        run(keys("int4", 8), values("int4"))
    with pytest.raises(ValueError, match="take a multiple of 16 that divides 32"):
        run(keys("int4"), values("int4", 8))
    assert isinstance(work, Work)
    half = quantize(torch.randn(64, 32), keys("int4"))
    own = Segment(half, half, int32([0]), int32([30]))
    with pytest.raises(ValueError, match="per token"):
        decode_attention(query, [own], scale=1.0)
    values_of = quantize(torch.randn(64, 32), values("int4"))
    with pytest.raises(AssertionError, match="whole"):
        decode_attention(query, [Segment(half, values_of, int32([0]), int32([30]))], scale=1.0)
