"""How sure a mean over prompts is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES, SEED, LEVEL = 4000, 0, 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean (Efron 1979), deterministic."""
    numbers = np.asarray(values, np.float64)
    drawn = np.random.default_rng(SEED).integers(0, len(numbers), (RESAMPLES, len(numbers)))
    low, high = np.quantile(numbers[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
