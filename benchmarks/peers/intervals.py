"""Bootstrap intervals of ratios of means, over the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cacheplan.intervals import interval, mean_interval, resamples

__all__ = ["mean_interval", "ratio_interval", "resamples"]


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """The interval of mean(above) / mean(below), both measured on the same prompts in order."""
    drawn = resamples(len(above))
    divisors = np.maximum(np.asarray(below)[drawn].mean(1), np.finfo(np.float64).tiny)
    return interval(np.asarray(above)[drawn].mean(1) / divisors)
