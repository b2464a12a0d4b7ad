"""How sure a mean over prompts is: percentile bootstrap (Efron 1979), deterministic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES, SEED, LEVEL = 4000, 0, 0.95


def resamples(prompts: int) -> NDArray[np.int64]:
    """Prompts drawn with replacement, `[RESAMPLES, prompts]`: the same for every arm (paired)."""
    return np.random.default_rng(SEED).integers(0, prompts, (RESAMPLES, prompts))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean."""
    return interval(np.asarray(values, np.float64)[resamples(len(values))].mean(1))


def interval(found: NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
