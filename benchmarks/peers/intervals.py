"""Bootstrap intervals of means and of ratios of means, over the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES, SEED, LEVEL = 4000, 0, 0.95


def resamples(prompts: int) -> NDArray[np.int64]:
    """Prompts drawn with replacement, `[RESAMPLES, prompts]`: the same for every arm (paired)."""
    return np.random.default_rng(SEED).integers(0, prompts, (RESAMPLES, prompts))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The percentile interval of the mean."""
    found = np.asarray(values)[resamples(len(values))].mean(1)
    return _interval(found)


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """The interval of mean(above) / mean(below), both measured on the same prompts in order."""
    drawn = resamples(len(above))
    divisors = np.maximum(np.asarray(below)[drawn].mean(1), np.finfo(np.float64).tiny)
    return _interval(np.asarray(above)[drawn].mean(1) / divisors)


def _interval(found: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
