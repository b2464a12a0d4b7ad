"""What decode_kernels.py compares: attention over caches of ours, torch's and transformers'."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cacheplan.kernels.decode_attention import naive
from cacheplan.kernels.decode_attention.segments import Segment, divide
from cacheplan.kernels.quantize.packed import Format, Packed

HKV, GROUP, D = 8, 4, 128
SCALE = D**-0.5
SHARES = (0.05, 0.05, 0.1, 0.1, 0.15, 0.2, 0.35, 0.6)  # of the tokens, by head; 0.2 on average
RECENT = 128

K4, V4 = Format("int4", "channel", 64), Format("int4", "token")
K2, V2 = Format("int2", "channel", 64), Format("int2", "token", 64)
FP8 = Format("fp8", "token")
FULL, FLASH = "ours bf16", "SDPA flash"
OURS = {  # share of the tokens, formats of keys and values
    FULL: (1.0, None, None),
    "ours 20 %": (0.2, None, None),
    "ours 20 % int4": (0.2, K4, V4),
    "ours int4": (1.0, K4, V4),
    "ours int2": (1.0, K2, V2),
    "ours fp8": (1.0, FP8, FP8),
}

THEIRS: dict[str, tuple[str, dict[str, Any]]] = {  # cache layers of transformers
    "transformers fp8": ("Fp8QuantizedLayer", {}),
    "transformers quanto int4": ("QuantoQuantizedLayer", {"nbits": 4}),
    "transformers hqq int4": ("HQQQuantizedLayer", {"nbits": 4, "axis_key": 1, "axis_value": 1}),
}

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Variant:
    """Calls on different memory, the bytes that one reads, and its error if it is compared."""

    calls: list[Call]
    counted: int
    error: float | None


def kept_lengths(B: int, L: int, share: float) -> list[int]:
    """Tokens per row, multiples of 64."""
    shares = [1.0] * HKV if share == 1 else SHARES
    return [64 * max(1, round(part * L / 64)) for _ in range(B) for part in shares]


def random_pool(N: int, format: Format | None, device: str, dtype: torch.dtype) -> Tensor | Packed:
    """N tokens: random numbers, or random codes whose numbers are of the same size."""
    if format is None:
        return torch.randn(N, D, device=device, dtype=dtype)
    codes = torch.randint(0, 256, (N, D // format.planes), device=device, dtype=torch.uint8)
    group = format.group or D
    shape = (N // group, D) if format.axis == "channel" else (N, D // group)
    noise = 0.75 + 0.5 * torch.rand(shape, device=device)
    if format.number == "fp8":
        codes &= 0xBF  # below 2: no NaN, and of ordinary size
        return Packed(codes, noise.half(), None, None, format)
    scale = (noise * 3.5 / format.levels).half()
    zero = (-1.75 * noise).half()
    return Packed(codes, scale, zero, None, format)


def storage(pool: Tensor | Packed) -> int:
    return pool.nbytes if isinstance(pool, Packed) else pool.numel() * pool.element_size()


def random_segments(B: int, L: int, name: str, device: str, dtype: torch.dtype) -> list[Segment]:
    share, key, value = OURS[name]
    lengths = kept_lengths(B, L, share)
    parts = [(lengths, key, value)]
    if key is not None:
        parts = [([n - min(n, RECENT) for n in lengths], key, value)]
        parts.append(([min(n, RECENT) for n in lengths], None, None))
    segments = []
    for own, k, v in parts:
        starts = [sum(own[:r]) for r in range(len(own))]
        keys, values = (random_pool(sum(own), format, device, dtype) for format in (k, v))
        offsets, counts = torch.tensor([starts, own], dtype=torch.int32, device=device)
        segments.append(Segment(keys, values, offsets, counts))
    return segments


def row_error(found: Tensor, query: Tensor, segments: list[Segment]) -> float:
    """Relative error against float64 of the first, a middle and the last row."""
    rows = len(segments[0].lengths)
    worst = 0.0
    for r in (0, rows // 2, rows - 1):
        own = [
            Segment(s.keys, s.values, s.offsets[r : r + 1], s.lengths[r : r + 1]) for s in segments
        ]
        folded = query.double().view(rows, GROUP, D)[r : r + 1]
        expected = naive.decode_attention(folded, own, scale=SCALE)
        off = found.double().reshape(rows, GROUP, D)[r : r + 1] - expected
        error = float(off.norm() / expected.norm())
        worst = error if math.isnan(error) else max(worst, error)
    return worst


def inputs(
    B: int, L: int, name: str, sets: int, device: str, dtype: torch.dtype
) -> list[tuple[Tensor, list[Segment]]]:
    """Queries and caches on different memory."""
    return [
        (
            torch.randn(B, HKV * GROUP, D, device=device).to(dtype),
            random_segments(B, L, name, device, dtype),
        )
        for _ in range(sets)
    ]


def variant(given: list[tuple[Tensor, list[Segment]]], calls: list[Call]) -> Variant:
    query, segments = given[-1]
    counted = sum(storage(s.keys) + storage(s.values) for s in segments)
    return Variant(calls, counted, row_error(calls[-1](), query, segments))


def ours(given: list[tuple[Tensor, list[Segment]]], processors: int) -> Variant:
    from cacheplan.kernels.decode_attention import triton

    calls: list[Call] = []
    for query, segments in given:
        lengths = [segment.lengths.tolist() for segment in segments]
        work = divide(lengths, processors=processors, device=query.device)
        calls.append(partial(triton.decode_attention, query, segments, work, scale=SCALE))
    return variant(given, calls)


def flash(given: list[tuple[Tensor, list[Segment]]]) -> Variant:
    """torch's flash kernel on full caches; pinned, as it else falls to a slow one silently."""
    calls: list[Call] = []
    for query, (whole,) in given:
        assert isinstance(whole.keys, Tensor)
        assert isinstance(whole.values, Tensor)
        shape = query.shape[0], HKV, -1, D
        keys, values = whole.keys.view(shape), whole.values.view(shape)
        calls.append(partial(pinned_flash, query[:, :, None], keys, values))
    return variant(given, calls)


def pinned_flash(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(query, keys, values, scale=SCALE, enable_gqa=True)


def theirs(B: int, L: int, name: str, device: str, dtype: torch.dtype) -> Variant | str:
    """A step of a quantised cache of transformers, or why there is none.

    It dequantises all tokens, then runs flash.  Its numbers are known to it alone.
    """
    from transformers import cache_utils

    def random(heads: int, tokens: int) -> Tensor:
        return torch.randn(B, heads, tokens, D, device=device).to(dtype)

    kind, options = THEIRS[name]
    query, new = random(HKV * GROUP, 1), (random(HKV, 1), random(HKV, 1))
    try:
        layer = getattr(cache_utils, kind)(**options)
        layer.update(random(HKV, L), random(HKV, L))
        layer.update(*new)
        state = dict(vars(layer))

        def call() -> Tensor:
            vars(layer).update(state)  # every call adds the same token
            return pinned_flash(query, *layer.update(*new))

        assert call().isfinite().all()
    except (ImportError, AttributeError, RuntimeError) as error:  # not installed, out of memory
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    bits = options.get("nbits", 8)
    return Variant([call], 2 * B * HKV * L * D * bits // 8, None)
