"""Attention of one query per sequence on a CPU with old tokens in int8, by torch's int8 product.

The product reads int8 weights and bfloat16 activations; scales act on its columns, so keys have one
per token and values, stored transposed, one per channel.  Logits and weights are bfloat16 numbers:
the relative error on Gaussian data is about 2 %, most of it from the codes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256  # tokens are quantised in multiples of it
ALIGNED = 32  # the product reads its inner dimension in vectors, beyond the end if it is odd
MOST = 127


@dataclass(frozen=True, eq=False)
class Int8Tokens:
    """Some tokens of one row.

    `keys` int8 `[L, D]` with `key_scale` `[L]`, `values` int8 `[Dv, L]` with `value_scale` `[Dv]`;
    the scales are bfloat16.
    """

    keys: Tensor
    key_scale: Tensor
    values: Tensor
    value_scale: Tensor

    @property
    def nbytes(self) -> int:
        tensors = (self.keys, self.key_scale, self.values, self.value_scale)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@dataclass(frozen=True, eq=False)
class Int8Row:
    """The tokens of one (batch entry, kv head): int8 parts, and the latest in bfloat16.

    `keys` `[n, D]` and `values` `[n, Dv]` are those that do not fill a block yet.
    """

    parts: Sequence[Int8Tokens]
    keys: Tensor
    values: Tensor


@functools.cache
def available() -> bool:
    """Whether this torch has the product, a private function, and it is right on this processor."""
    product = getattr(torch, "_weight_int8pack_mm", None)
    if product is None:
        return False
    codes = torch.arange(-MOST, MOST + 2, dtype=torch.int16).to(torch.int8).view(4, -1)
    row = torch.linspace(-1, 1, codes.shape[1]).bfloat16()[None]
    scale = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.bfloat16)
    try:
        found = product(row, codes, scale)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    expected = row.double() @ codes.double().T * scale.double()
    return bool(torch.allclose(found.double(), expected, rtol=1e-2, atol=1e-1))


def quantize(keys: Tensor, values: Tensor) -> Int8Tokens:
    """Quantise L tokens of one row, `[L, D]` and `[L, Dv]`: symmetric, never again.

    Raises ValueError unless L is a multiple of 256 and D of 32, as the product needs them, and for
    NaN and infinite numbers.
    """
    L, D = keys.shape
    assert values.shape[0] == L, (values.shape, L)
    if L % BLOCK or D % ALIGNED:
        raise ValueError(
            f"{L} tokens of {D} channels cannot be int8 here; take a multiple of {BLOCK} tokens "
            f"and of {ALIGNED} channels."
        )
    if not (keys.isfinite().all() and values.isfinite().all()):
        raise ValueError("Only finite numbers are quantised; these hold NaN or infinite ones.")
    key_codes, key_scale = _symmetric(keys.float())
    value_codes, value_scale = _symmetric(values.float().T)
    return Int8Tokens(key_codes, key_scale, value_codes, value_scale)


def decode_attention(query: Tensor, rows: Sequence[Int8Row], *, scale: float) -> Tensor:
    """Attend from `[B, H, D]` in bfloat16; returns `[B, H, Dv]`.

    Head h reads row `b * Hkv + h // (H / Hkv)`.  Old and latest tokens share one softmax.
    """
    assert query.dtype == torch.bfloat16, query.dtype
    B, H, D = query.shape
    folded = (query * scale).reshape(len(rows), -1, D)  # [R, G, D]: scaled here, not token by token
    out = folded.new_empty(*folded.shape[:2], rows[0].values.shape[1])
    for own, row, result in zip(folded, rows, out, strict=True):
        logits = [torch._weight_int8pack_mm(own, p.keys, p.key_scale) for p in row.parts]
        # float32: bfloat16 products of few tokens cost more to set up than to compute
        latest = (own.float() @ row.keys.float().T).bfloat16()
        weights = torch.cat([*logits, latest], 1).softmax(1)
        sizes = [*(p.keys.shape[0] for p in row.parts), row.keys.shape[0]]
        *parts, latest = torch.split(weights, sizes, 1)
        found = latest.float() @ row.values.float()
        for weight, p in zip(parts, row.parts, strict=True):
            found += torch._weight_int8pack_mm(weight.contiguous(), p.values, p.value_scale)
        result.copy_(found)
    return out.view(B, H, -1)


def _symmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of `[n, m]` and one bfloat16 scale for each of the n."""
    scale = (x.abs().amax(1) / MOST).bfloat16()
    scale = torch.where(scale > 0, scale, 1.0)
    codes = (x / scale.float()[:, None]).round().clamp(-MOST, MOST)
    return codes.to(torch.int8).contiguous(), scale
