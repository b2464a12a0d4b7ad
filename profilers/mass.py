"""How concentrated a layer's attention is: the share held by the best tokens."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacheplan.kernels.column_sums.naive import column_sums

POINTS = 128


def mass_curve(query: Tensor, key: Tensor, *, scale: float) -> NDArray[np.float64]:
    """Share of accumulated attention in the best i/128 of the tokens, `[129]`.

    Column sums over all query rows, averaged over heads, sorted descending, accumulated and
    normalised (PrefixKV, arXiv 2412.03409, section 3.2); linear between tokens.
    """
    received = column_sums(query, key, scale=scale).double().sum((0, 1))
    share = torch.cumsum(received.sort(descending=True).values, 0).cpu().numpy()
    share = np.concatenate([[0.0], share / share[-1]])
    at = np.linspace(0, len(share) - 1, POINTS + 1)
    curve: NDArray[np.float64] = np.interp(at, np.arange(len(share)), share)
    return curve


def image_mass(query: Tensor, key: Tensor, pictured: Tensor, scale: float) -> float:
    """Share of image tokens in the attention that the context receives, mean over heads.

    `query` `[1, H, T, D]` are the continuation's and `key` `[1, K, C + T, D]` those of the whole
    text; `pictured` `[C]` (bool) tells the images in the context.
    """
    received = column_sums(query, key, scale=scale)[0, :, : len(pictured)].double().sum(0)
    return float(received[pictured].sum() / received.sum())
