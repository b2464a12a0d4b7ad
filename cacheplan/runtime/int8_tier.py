"""Older tokens in int8, as torch's product for CPUs reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cacheplan.errors import UnsupportedError
from cacheplan.kernels.decode_attention.cpu_int8 import Int8Tokens, available, quantize
from cacheplan.plans.storage import INT8_TOKENS
from cacheplan.types import Tier


class Int8Tier:
    """The int8 tokens of some rows: for each row the parts in which they were packed.

    Keys have a scale per token, values one per channel and part; a prompt is one part, so that
    few products read it.
    """

    def __init__(self, tier: Tier, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Store keys `[n, D]` and values `[n, Dv]` of every row, n a multiple of 256.

        Raises UnsupportedError where the product is missing.
        """
        device = keys[0].device
        if device.type != "cpu" or not available():
            raise UnsupportedError(
                "Values in int8 by channel are read by torch's int8 product for CPUs, which is not "
                f"available on {device}: solve a plan whose values have scales per token."
            )
        self.widths = keys[0].shape[1], values[0].shape[1]
        self.rows: list[list[Int8Tokens]] = [[] for _ in keys]
        for r, (key, value) in enumerate(zip(keys, values, strict=True)):
            if len(key):
                self.rows[r].append(quantize(key, value))

    @property
    def lengths(self) -> list[int]:
        return [sum(part.keys.shape[0] for part in parts) for parts in self.rows]

    @property
    def nbytes(self) -> int:
        """Of the unique parts: rows that were repeated for beams share theirs."""
        parts = {id(part): part for own in self.rows for part in own}
        return sum(part.nbytes for part in parts.values())

    def row(self, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of one row as numbers of `dtype`."""
        keys = [p.keys.to(dtype) * p.key_scale.to(dtype)[:, None] for p in self.rows[r]]
        values = [(p.values.to(dtype) * p.value_scale.to(dtype)[:, None]).T for p in self.rows[r]]
        none = [torch.empty(0, width, dtype=dtype) for width in self.widths]
        return torch.cat([none[0], *keys]), torch.cat([none[1], *values])

    def append(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Add tokens to the end of every row, 256 in a part."""
        for parts, key, value in zip(self.rows, keys, values, strict=True):
            for start in range(0, len(key), INT8_TOKENS):
                new = slice(start, start + INT8_TOKENS)
                parts.append(quantize(key[new], value[new]))

    def select(self, rows: Sequence[int]) -> None:
        """Rows in this order, repeated or left out; what is packed is never changed."""
        self.rows = [list(self.rows[r]) for r in rows]
