"""Numbers by which published methods divide a cache among layers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacheplan.scorers.spectrum import high_frequencies

PASSBAND = 0.1  # FlashCache's share of low frequencies


def spectral_residual(key: Tensor, value: Tensor) -> float:
    """Share of the energy of keys above the passband, plus that of values, `[1, K, S, D]` each.

    FlashCache (arXiv 2511.16786): R = E_high(K) / E(K) + E_high(V) / E(V).
    """
    total = 0.0
    for x in (key, value):
        energy = x.double().square().sum().clamp(min=1e-30)
        total += float(high_frequencies(x, PASSBAND).double().square().sum() / energy)
    return total


def output_energy(output: Tensor, kv_heads: int) -> NDArray[np.float64]:
    """Squared norm of the attention output `[1, T, H, D]`, `[K]`: the unit of `damage`.

    Summed over channels and the query heads of the group, mean over queries.
    """
    energy = output[0].double().square().sum(-1)  # [T, H]
    found: NDArray[np.float64] = energy.mean(0).view(kv_heads, -1).sum(1).cpu().numpy()
    return found


def block_mask(length: int, *, window: int, sinks: int, device: torch.device) -> Tensor:
    """Causal attention within overlapping blocks of half a window, and to the sinks, `[S, S]`.

    A query sees its own half window and the one before.
    """
    index = torch.arange(length, device=device)
    half = index // max(1, window // 2)
    near = (half[:, None] - half <= 1) | (index < sinks)
    return near & (index <= index[:, None])


def key_distance(key: Tensor, other: Tensor) -> float:
    """Mean cosine distance between the same tokens' keys of two runs, `[1, K, S, D]` each."""
    near = torch.nn.functional.cosine_similarity(key.double(), other.double(), dim=-1)
    return max(0.0, 1.0 - float(near.mean()))
