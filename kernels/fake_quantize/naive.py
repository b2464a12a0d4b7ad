"""Numbers rounded to what few bits can tell, and still floats: quantised and dequantised at once.

Asymmetric grids as in CacheQuant (arXiv 2503.01323, and its published code): 0 is always on the
grid, `x = (clip(round(x / scale) + zero, 0, 2^bits - 1) - zero) * scale`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_POWER = 2.4  # of the weights' errors
_SHARES = tuple(1 - 0.02 * i for i in range(40))  # of the range, for weights


def on_grid(values: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """`values` in float32 on the grid of `2^bits` numbers from `low <= 0` to `high >= 0`.

    `low` and `high` broadcast to `values`; where both are 0, so is the result.
    """
    most = 2**bits - 1
    scale = ((high - low) / most).clamp(min=1e-12)
    zero = (-low / scale).round()
    codes = ((values / scale).round() + zero).clamp(0, most)
    found: Tensor = (codes - zero) * scale
    return found


def weights_on_grid(weight: Tensor, bits: int) -> Tensor:
    """`[O, I]`: weights with a grid for each output channel.

    Each channel's range, from its lowest to its highest weight, is shrunk by the factor of forty
    after which the mean of |error|^2.4 is smallest.
    """
    values = weight.float()
    low = values.amin(1, keepdim=True).clamp(max=0)
    high = values.amax(1, keepdim=True).clamp(min=0)
    best, least = values, torch.full_like(low, torch.inf)
    for share in _SHARES:
        found = on_grid(values, share * low, share * high, bits)
        error = (found - values).abs().pow(_POWER).mean(1, keepdim=True)
        best = torch.where(error < least, found, best)
        least = torch.minimum(error, least)
    return best.to(weight.dtype)
