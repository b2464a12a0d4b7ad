"""Keys and values as courses over time: what a low-pass filter leaves out."""

from __future__ import annotations

import torch
from torch import Tensor

from cacheplan.scorers.seen import Seen
from cacheplan.types import LowPassResidual


def low_pass_residual(scorer: LowPassResidual, seen: Seen) -> Tensor:
    """mean_d (k - lowpass k)^2 + mean_d (v - lowpass v)^2 (FlashCache, arXiv 2511.16786)."""
    key, value = (high_frequencies(x, scorer.passband) for x in (seen.key, seen.value))
    return key.square().mean(-1) + value.square().mean(-1)


def high_frequencies(x: Tensor, passband: float) -> Tensor:
    """`x` `[..., S, D]` without DCT-II coefficients 0 to `passband * S` along S, in float32.

    A DCT-II is the Fourier transform of the sequence followed by its mirror image, so a filter
    there is the same orthogonal projection.
    """
    S = x.shape[-2]
    x = x.float()
    spectrum = torch.fft.rfft(torch.cat([x, x.flip(-2)], dim=-2), dim=-2)
    spectrum[..., : int(passband * S) + 1, :] = 0
    filtered: Tensor = torch.fft.irfft(spectrum, n=2 * S, dim=-2)[..., :S, :]
    return filtered
