"""How far two pictures are apart: mean square error, PSNR and structural similarity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MOST = 100.0  # decibels, of pictures that are the same
WIDTH, SIGMA = 11, 1.5  # of the window of Wang et al. 2004
K1, K2 = 0.01, 0.03


def pixels(picture: Any) -> Floats:
    """A PIL image as `[H, W, 3]` from 0 to 1."""
    found: Floats = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255
    return found


def square_error(a: Floats, b: Floats) -> float:
    return float(np.mean((a - b) ** 2))


def psnr(error: float) -> float:
    """Decibels of a mean square error of values from 0 to 1; at most `MOST`."""
    return min(MOST, -10 * math.log10(error)) if error > 0 else MOST


def ssim(a: Floats, b: Floats) -> float:
    """Mean structural similarity of `[H, W, C]` from 0 to 1 (Wang et al. 2004).

    Gaussian windows that lie within the picture, each channel for itself; pictures smaller than
    the window get a smaller one.
    """
    window = _window(min(WIDTH, *a.shape[:2]))

    def blurred(x: Floats) -> Floats:
        for axis in (0, 1):
            views = np.lib.stride_tricks.sliding_window_view(x, len(window), axis)
            x = views @ window
        return x

    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    both = blurred(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    shape = (2 * both + K2**2) / (var_a + var_b + K2**2)
    return float((light * shape).mean())


def _window(width: int) -> Floats:
    at = np.arange(width) - (width - 1) / 2
    weights = np.exp(-(at**2) / (2 * SIGMA**2))
    found: Floats = weights / weights.sum()
    return found
