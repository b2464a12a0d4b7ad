"""Linear layers in few bits: ranges of activations, and the correction of what comes out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cacheplan.errors import UnsupportedError
from cacheplan.schedules.groups import whole
from cacheplan.schedules.tables import statistic
from cacheplan.types import (
    RANGE_UNIT,
    FeatureProfile,
    FeatureRecipe,
    LinearEntry,
    Precision,
    WeightAction,
)

Floats = NDArray[np.float64]
Vectors = tuple[tuple[float, ...], ...]  # [T][C]
_DIGITS = 6
_WIDTH = 3  # standard deviations over prompts
_READERS = 8  # bits of weights behind the last block, as of the last layers in the paper's code


def linear_entries(profile: FeatureProfile, recipe: FeatureRecipe) -> tuple[LinearEntry, ...]:
    """The plan's layers with the recipe's bits, in the order of the profile.

    ProfileError if the profile did not measure them, UnsupportedError if the model is a UNet.
    """
    if recipe.bits is None:
        return ()
    if whole(profile).part == "branch":
        raise UnsupportedError(
            f'The recipe "{recipe.name}" is for transformers, but {profile.model.architecture} is '
            'a UNet: choose "cachequant".'
        )
    ranges = _ranges(profile)
    corrections = output_corrections(profile)
    weight, activation = recipe.bits
    made = []
    for path, own in zip(profile.linears, ranges, strict=True):
        if not own.any():  # never given anything but zeros
            continue
        scale, shift = corrections.get(path, ((), ()))
        bits = max(weight, _READERS) if path in corrections else weight
        action = WeightAction(
            weight=Precision(format="int", bits=bits, axis="channel"),
            activation=Precision(format="int", bits=activation, axis="tensor"),
        )
        made.append(
            LinearEntry(
                path=path,
                action=action,
                ranges=tuple((_short(low), _short(high)) for low, high in own),
                channel_scale=scale,
                channel_shift=shift,
            )
        )
    return tuple(made)


def _ranges(profile: FeatureProfile) -> Floats:
    """`[linear, T, 2]`: so far that few prompts go beyond; their means alone clip every other one.

    The paper's code takes the extremes of all prompts, which unlike these depend on their number.
    """
    mean = statistic(profile, "activation_range")
    spread = _WIDTH * profile.statistics["activation_range"].std
    found: Floats = (mean + spread * np.array([-1, 1])) * RANGE_UNIT
    return found


def output_corrections(profile: FeatureProfile) -> dict[str, tuple[Vectors, Vectors]]:
    """Slope and intercept per step and output channel of the layers that read the last block.

    For transformers these are what CacheQuant's consumers of the cached feature are: in a UNet the
    first layers of the last up block, here the projections behind the last block.
    """
    moments = statistic(profile, "reader_moments") if profile.readers else np.zeros((0, 0, 4))
    found, start = {}, 0
    for path, channels in profile.readers:
        slope, shift = output_fit(moments[start : start + channels])
        found[path] = _vectors(slope), _vectors(shift * RANGE_UNIT)
        start += channels
    return found


def output_fit(moments: Floats) -> tuple[Floats, Floats]:
    """Least squares slope and intercept, of any shape, from the means `[..., 4]` of e, q, eq, q^2.

    q is the output in few bits and q + e the true one (CacheQuant, arXiv 2503.01323, section 4.2).
    Where q hardly varies only its mean is corrected.
    """
    e, q, product, square = np.moveaxis(moments, -1, 0)
    variance, covariance = square - q * q, product - e * q
    varies = variance > 1e-9 * square
    slope = 1 + np.where(varies, covariance / np.where(varies, variance, 1.0), 0.0)
    return slope, e + (1 - slope) * q


def _vectors(table: Floats) -> Vectors:
    """Of `[C, T]`, rounded."""
    return tuple(tuple(round(float(x), _DIGITS) for x in row) for row in table.T)


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
