"""TeaCache's polynomial: how far the output moves, from how far the modulated input does."""

from __future__ import annotations

from cacheplan.types import Rescale


def rescaled(curve: Rescale, change: float) -> float:
    """The change of the output for a relative `change` of the input.

    TeaCache (Liu et al. 2024, arXiv 2411.19108) takes the polynomial as it is; fits of degree 4
    are negative or rise without limit outside of what they were fitted to, so here the argument is
    held within that range and the result is at least 0.
    """
    at = min(max(change, curve.low), curve.high)
    found = 0.0
    for coefficient in curve.coefficients:
        found = found * at + coefficient
    return max(found, 0.0)
