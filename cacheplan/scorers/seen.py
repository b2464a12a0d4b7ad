"""What scorers look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cacheplan.types import ProbeAttention


@dataclass(frozen=True, eq=False)
class Rotary:
    """How positions are rotated into queries and keys.

    The first 2 R channels form pairs that turn by `frequencies` `[R]` radians per position:
    neighbours if `interleaved`, else channels i and i + R.  Further channels stay as they are.
    """

    frequencies: Tensor
    interleaved: bool = False

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Channels of the first and of the second member of each pair."""
        R = len(self.frequencies)
        index = torch.arange(2 * R, device=self.frequencies.device)
        return (index[0::2], index[1::2]) if self.interleaved else (index[:R], index[R:])


@dataclass(frozen=True, eq=False)
class Seen:
    """What a scorer may look at: one layer's tokens, with positions already rotated in.

    `query` `[B, H, T, D]` holds the newest T of the S tokens in `key` `[B, K, S, D]` and `value`
    `[B, K, S, Dv]`; keys may have gaps where tokens were evicted before.  `scale` multiplies the
    logits.  `start` is the position of the first query.  `rotary` is needed by scorers that undo
    the rotation (`needs_rotary`), and `probed` `[B, K, S]` is what each probe has found.
    `images` `[B, S]` (bool) are the image tokens, where there are any.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    start: int = 0
    rotary: Rotary | None = None
    probed: Mapping[ProbeAttention, Tensor] = field(default_factory=dict)
    images: Tensor | None = None

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.query.shape[1] // self.key.shape[1]

    def heads(self, kv_heads: list[int]) -> Seen:
        """Only these kv heads, with the query heads that read them."""
        queries = [h * self.group + g for h in kv_heads for g in range(self.group)]
        return replace(
            self,
            query=self.query[:, queries],
            key=self.key[:, kv_heads],
            value=self.value[:, kv_heads],
            probed={scorer: found[:, kv_heads] for scorer, found in self.probed.items()},
        )
