"""How much of a cache a layer's attention prefers to have (CAKE, arXiv 2503.12491)."""

from __future__ import annotations

from cacheplan.scorers.attention import window_weights
from cacheplan.scorers.seen import Seen
from cacheplan.types import Preference

WINDOW = 32  # the observation window
_TINY = 1e-10  # inside the logarithm, as in the authors' code


def window_dispersion_and_shift(seen: Seen) -> tuple[float, float]:
    """Entropy of the attention of the last 32 queries to the tokens before them, and its change.

    CAKE (arXiv 2503.12491): -sum_ij A log A and sum_j Var_i A over the queries i of the window and
    the tokens j before it, not normalised anew.  Means over heads (and, for the entropy, queries)
    instead of sums: the common factor cancels in a division among layers.
    """
    window = min(WINDOW, seen.key.shape[2] // 2)
    early = window_weights(seen, window)[..., :-window].double()  # [1, H, W, S - W]
    dispersion = -(early * (early + _TINY).log()).sum(-1).mean()
    shift = early.var(2).sum(-1).mean()
    return max(0.0, float(dispersion)), float(shift)


def preference(weight: Preference, seen: Seen) -> float:
    """dispersion^(1 / tau_dispersion) shift^(1 / tau_shift) of one layer and text."""
    dispersion, shift = window_dispersion_and_shift(seen)
    return float(dispersion ** (1 / weight.tau_dispersion) * shift ** (1 / weight.tau_shift))
