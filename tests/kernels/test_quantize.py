"""Quantised keys and values: golden vectors, bytes, error bounds; Triton gives the naive codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cacheplan.kernels.quantize.naive import dequantize, quantize
from cacheplan.kernels.quantize.packed import Format, Packed, channel_scales

INTEGERS = ("int8", "int4", "int2")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
KEYS = [Format(n, "channel", 32) for n in INTEGERS]  # type: ignore[arg-type]
TOKENS = [Format(n, "token") for n in INTEGERS]  # type: ignore[arg-type]
SEPARABLE = [Format(n, "token", separable=True) for n in INTEGERS]  # type: ignore[arg-type]
FORMATS = [*KEYS, *TOKENS, *SEPARABLE, Format("fp8", "token")]
GROUPED = [
    Format("int8", "channel", 24),
    Format("int4", "channel", 128),
    Format("int4", "token", 40),
    Format("int2", "token", 20),
    Format("int2", "token", 40),
]


@pytest.fixture(scope="module")
def interpreted(interpreted_kernel: Callable[[str], Any]) -> Any:
    return interpreted_kernel("quantize")


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels of unlike size and place, as keys have them."""
    D = shape[-1]
    return (torch.randn(shape) * 3 * torch.rand(D) + torch.randn(D)).to(dtype)


def steps(packed: Packed) -> Tensor:
    """The scale of every element, the channel's included."""
    unit = Packed(
        torch.full_like(packed.codes, sum(1 << i for i in range(0, 8, packed.format.bits))),
        packed.scale,
        torch.zeros_like(packed.scale),
        packed.channel_scale,
        packed.format,
    )
    return dequantize(unit, torch.float64)


def assert_same(found: Packed, expected: Packed) -> None:
    for name in ("codes", "scale", "zero", "channel_scale"):
        own, other = getattr(found, name), getattr(expected, name)
        assert (own is None) == (other is None), name
        assert own is None or torch.equal(own, other), name


@pytest.mark.parametrize(
    ("number", "codes", "scale", "values"),
    [("int2", [0, 1, 1, 3], 1.0, [-1, 0, 0, 2]), ("int4", [0, 5, 7, 15], 0.2, [-1, 0, 0.4, 2])],
)
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_golden_group(
    number: Any, codes: list[int], scale: float, values: list[float], axis: Any
) -> None:
    group = torch.tensor([[-1.0, 0.0, 0.4, 2.0]])
    x = group.T.expand(4, 4).contiguous() if axis == "channel" else group
    packed = quantize(x, Format(number, axis, 4))
    found = dequantize(packed)
    assert packed.zero is not None
    assert (packed.zero == -1).all()
    torch.testing.assert_close(
        packed.scale.float(), torch.full(packed.scale.shape, scale), rtol=1e-3, atol=0
    )
    expected = torch.tensor([values]).T.expand(4, 4) if axis == "channel" else [values]
    torch.testing.assert_close(found, torch.as_tensor(expected).float(), rtol=1e-3, atol=2e-3)
    own = (found[:, 0] if axis == "channel" else found[0]) + 1
    assert (own / packed.scale.flatten()[0].float()).round().int().tolist() == codes


def test_golden_layout() -> None:
    """Half-split bytes: channel c beside channel c + D / planes."""
    x = torch.tensor([[-1.0, 0.0, 0.4, 2.0]])
    assert quantize(x, Format("int4", "token")).codes.tolist() == [[0 | 7 << 4, 5 | 15 << 4]]
    assert quantize(x, Format("int2", "token")).codes.tolist() == [[0 | 1 << 2 | 1 << 4 | 3 << 6]]


@pytest.mark.parametrize(("group", "bits"), [(32, 3.0), (64, 2.5), (128, 2.25)])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_golden_effective_bits(group: int, bits: float, axis: Any) -> None:
    """KIVI's two bits with float16 scales and zeros."""
    packed = quantize(torch.randn(256, 128), Format("int2", axis, group))
    assert packed.nbytes * 8 / (256 * 128) == bits


@pytest.mark.parametrize(
    ("number", "percent"), [(None, 32.5), ("int8", 23.125), ("int4", 18.125), ("int2", 15.625)]
)
def test_golden_two_tiers(number: Any, percent: float) -> None:
    """MiKV: a fifth of the tokens in 16 bits or `number`, the others in two, groups of d / 2."""
    low = quantize(torch.randn(800, 128), Format("int2", "token", 64)).nbytes
    high = 2 * 200 * 128
    if number is not None:
        high = quantize(torch.randn(200, 128), Format(number, "token", 64)).nbytes
    assert 100 * (low + high) / (2 * 1000 * 128) == percent


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    number=st.sampled_from(["int8", "int4", "int2", "fp8"]),
    axis=st.sampled_from(["channel", "token", "separable"]),
    group=st.sampled_from([None, 1, 3, 8, 24]),
    blocks=st.integers(0, 3),
    channels=st.integers(1, 6),
    rows=st.integers(1, 3),
)
def test_bytes_are_those_of_the_formula(
    number: Any, axis: str, group: int | None, blocks: int, channels: int, rows: int
) -> None:
    D, T = 4 * channels, 8 * blocks
    if number == "fp8":
        format, scales = Format("fp8", "token"), T * 2
    elif axis == "channel":
        format = Format(number, "channel", 8)
        scales = math.ceil(T / 8) * D * 4
    elif axis == "separable":
        format, scales = Format(number, "token", separable=True), T * 4 + 2 * D
    else:
        format = Format(number, "token", group)
        scales = T * math.ceil(D / (group or D)) * 4
    packed = quantize(torch.ones(rows, T, D) if T else torch.ones(rows, 8, D), format)
    if T == 0:
        assert format.nbytes(0, D) == scales
        return
    assert packed.nbytes == rows * format.nbytes(T, D)
    assert format.nbytes(T, D) * 8 == T * D * format.bits + scales * 8


def test_a_shared_storage_counts_once() -> None:
    both = torch.empty(2, 4, 8, dtype=torch.float16)
    codes = torch.empty(4, 8, dtype=torch.uint8)
    packed = Packed(codes, both[0], both[1], None, Format("int8", "token", 1))
    assert packed.nbytes == 2 * 4 * 8 * 2 + 32


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    format=st.sampled_from([*(f for f in FORMATS if f.number != "fp8"), GROUPED[2], GROUPED[3]]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
    size=st.integers(-30, 14),
    place=st.sampled_from([0.0, 1.0, -100.0, 3e4]),
)
def test_errors_are_at_most_half_a_scale(
    format: Format, dtype: torch.dtype, seed: int, size: int, place: float
) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 80, generator=random) * 2.0**size + place
    x = x.clamp(-65504, 65504).to(dtype).clamp(-65504, 65504)
    packed = quantize(x, format)
    off = (dequantize(packed, torch.float64) - x.double()).abs()
    rounding = 2.0**-22 * (x.double().abs() + x.double().abs().max())  # of float32 arithmetic
    assert (off <= steps(packed) / 2 + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_errors_are_those_of_its_fraction(dtype: torch.dtype) -> None:
    x = sample(64, 80, dtype=dtype)
    packed = quantize(x, Format("fp8", "token"))
    off = (dequantize(packed, torch.float64) - x.double()).abs()
    assert (off <= x.double().abs() * (2.0**-4 + 1e-6) + packed.scale.double() * 2.0**-10).all()


@pytest.mark.parametrize("format", [*FORMATS, *GROUPED], ids=str)
@pytest.mark.parametrize("value", [0.0, -2.5, 65504.0, 2.0**-24])
def test_constants_survive(format: Format, value: float) -> None:
    x = torch.full((384, 80), value)
    found = dequantize(quantize(x, format))
    if format.number == "fp8" or format.separable:  # a constant is one scale, rounded
        torch.testing.assert_close(found, x, rtol=1e-3, atol=2.0**-24)
    else:
        assert torch.equal(found, x)


@pytest.mark.parametrize("format", KEYS + SEPARABLE, ids=str)
def test_an_outlier_channel_spoils_no_other(format: Format) -> None:
    """Why keys are quantised per channel, and why values may be divided by their channels."""
    x = torch.randn(64, 80)
    spoilt = x.clone()
    spoilt[:, 7] *= 100
    whole = Format(format.number, "token")

    def error(chosen: Format) -> float:
        off = dequantize(quantize(spoilt, chosen)) - spoilt
        return float(off[:, torch.arange(80) != 7].norm())

    assert error(format) < error(whole) / (5 if format.axis == "channel" else 1.5)


def test_separable_scales_can_be_fixed_before() -> None:
    first, second = sample(32, 80), sample(32, 80)
    format = Format("int4", "token", separable=True)
    scale = channel_scales(first)
    packed = quantize(second, format, scale)
    assert packed.channel_scale is scale
    off = (dequantize(packed, torch.float64) - second.double()).abs()
    assert (off <= steps(packed) / 2 + 1e-5).all()


def test_rows_are_independent() -> None:
    x = sample(3, 64, 80)
    for format in [*FORMATS, GROUPED[2]]:
        whole, last = quantize(x, format), quantize(x[2], format)
        assert torch.equal(whole.codes[2], last.codes)
        assert torch.equal(dequantize(whole)[2], dequantize(last))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e9])
def test_what_is_not_finite_is_refused(interpreted: Any, format: Format, bad: float) -> None:
    x = torch.randn(32, 80)
    x[3, 5] = bad
    for run in (quantize, interpreted.quantize):
        with pytest.raises(ValueError, match="finite"):
            run(x, format)


def test_what_does_not_fit_is_refused(interpreted: Any) -> None:
    x = torch.randn(31, 80)
    for run in (quantize, interpreted.quantize):
        with pytest.raises(ValueError, match="keep the last 31 in 16 bits"):
            run(x, Format("int4", "channel", 32))
        with pytest.raises(ValueError, match="multiple of 4"):
            run(x[:, :78], Format("int2", "token"))
    with pytest.raises(ValueError, match="take a multiple of 40"):
        interpreted.quantize(x, Format("int4", "token", 32))
    wrong: list[dict[str, Any]] = [
        {"number": "int3", "axis": "token"},
        {"number": "int4", "axis": "channel"},
        {"number": "int4", "axis": "token", "group": 0},
        {"number": "fp8", "axis": "channel", "group": 32},
        {"number": "fp8", "axis": "token", "group": 32},
        {"number": "int4", "axis": "token", "group": 32, "separable": True},
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"\w"):
            Format(**arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [*FORMATS, *GROUPED], ids=str)
def test_triton_is_naive(interpreted: Any, format: Format, dtype: torch.dtype) -> None:
    x = sample(1, 384, 80, dtype=dtype) if format.group == 128 else sample(2, 96, 80, dtype=dtype)
    x[0, :, 5] = 0
    x[-1, 3] = 2
    x[-1, 4] *= 1e-6
    assert_same(interpreted.quantize(x, format), quantize(x, format))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_triton_on_strided_and_empty_inputs(interpreted: Any, format: Format) -> None:
    x = sample(64, 3, 40).transpose(0, 1)[..., ::2]
    assert_same(interpreted.quantize(x, format), quantize(x, format))
    empty = interpreted.quantize(x[:0], format)
    assert empty.codes.shape == (0, 64, 20 // format.planes)


def test_triton_rounds_halves_to_even_codes(interpreted: Any) -> None:
    x = torch.tensor([[0.0, 0.5, 1.5, 2.5, 3.5, 14.5, 13.5, 15.0]])
    found = interpreted.quantize(x, Format("int4", "token"))
    assert_same(found, quantize(x, Format("int4", "token")))
    assert dequantize(found).tolist() == [[0, 0, 2, 2, 4, 14, 14, 15]]


def test_triton_encodes_every_fp8_number(interpreted: Any) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    finite = numbers[numbers.isfinite()]
    middle = (finite.sort().values[1:] + finite.sort().values[:-1]) / 2  # ties
    x = torch.cat([finite, middle, middle * (1 + 1e-6)])[None]
    packed = interpreted.quantize(x, Format("fp8", "token"))
    assert packed.scale.item() == 1
    assert torch.equal(packed.codes, x.to(torch.float8_e4m3fn).view(torch.uint8))
