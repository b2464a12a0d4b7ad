"""Sums of floating-point arrays whose result does not depend on the order of adding.

Floating-point addition is not associative, so shards merged in another order would differ in
the last bits.  Each number is therefore split into two integers, `x = (hi * 2^40 + lo) * 2^-60`,
and integers add exactly: any order, any sharding, any interruption gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cacheplan.errors import ProfileError

_HI, _LO = 20, 40  # binary digits after the point in `hi`, and further digits in `lo`


def _split(x: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    scaled = x * 2.0**_HI
    hi = np.floor(scaled)
    lo = np.rint((scaled - hi) * 2.0**_LO)  # exact difference: both share their leading digits
    return hi.astype(np.int64), lo.astype(np.int64)


@dataclass(eq=False)
class ExactSum:
    """Sum, sum of squares and count of arrays of one shape."""

    count: int
    parts: NDArray[np.int64]  # [4, ...]: hi and lo of the sum, hi and lo of the squares

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> ExactSum:
        return cls(0, np.zeros((4, *shape), np.int64))

    def add(self, x: NDArray[np.float64], name: str) -> None:
        """Add one prompt's array; raises ProfileError on NaN, infinity or absurd size."""
        if not np.isfinite(x).all():
            raise ProfileError(
                f'The statistic "{name}" holds NaN or infinity: the model overflows on this '
                "prompt; profile it in float32 (--dtype float32)."
            )
        if (np.abs(x) >= 2.0**16).any():
            raise ProfileError(
                f'The statistic "{name}" reached {np.abs(x).max():.3g}, beyond the 65536 that '
                "exact sums hold: profile the model in float32 (--dtype float32)."
            )
        x = np.asarray(x, np.float64)
        self.merge(ExactSum(1, np.stack([*_split(x), *_split(x * x)])))

    def merge(self, other: ExactSum) -> None:
        self.parts = self.parts + other.parts
        for hi, lo in ((0, 1), (2, 3)):  # carry, so that equal sums have equal parts
            self.parts[hi] += self.parts[lo] >> _LO
            self.parts[lo] &= (1 << _LO) - 1
        self.count += other.count

    def mean(self) -> NDArray[np.float64]:
        return self._value(0) / max(self.count, 1)

    def std(self) -> NDArray[np.float64]:
        variance = self._value(2) / max(self.count, 1) - self.mean() ** 2
        return np.sqrt(np.maximum(variance, 0.0))

    def _value(self, part: int) -> NDArray[np.float64]:
        value: NDArray[np.float64] = self.parts[part] * 2.0**-_HI + self.parts[part + 1] * 2.0 ** -(
            _HI + _LO
        )
        return value
