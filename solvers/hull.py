"""Which options of a site matter: the undominated ones, and the lower convex hull of those.

Shapes: rates and distortions are `[sites, options]`, finite rates, distortion `inf` where an
option is unavailable (as `checked_knapsack` returns them).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cacheplan.types.problem import Floats, Integers


@dataclass(frozen=True, eq=False)
class Hull:
    """Lower convex hulls of all sites: where each starts, and its steps in falling slope.

    Each step `[steps]` moves `site` to `option`, costs `added` rate and saves `slope * added`
    distortion.  Steps of one site are in order; over all sites they are sorted by slope.
    """

    start: Integers  # [sites]: the cheapest option
    site: Integers
    option: Integers
    added: Floats
    slope: Floats


def undominated(rate: Floats, distortion: Floats) -> NDArray[np.bool_]:
    """True where no option of the site is as cheap and as good; of equals the first stays."""
    order = np.lexsort((distortion, rate), axis=-1)
    ordered = np.take_along_axis(distortion, order, -1)
    best_before = np.minimum.accumulate(ordered, -1)[:, :-1]
    better = np.concatenate([np.isfinite(ordered[:, :1]), ordered[:, 1:] < best_before], -1)
    kept = np.empty_like(better)
    np.put_along_axis(kept, order, better, -1)
    return kept


def lower_hull(rate: Floats, distortion: Floats) -> Hull:
    """Gift wrapping of all sites at once: from each corner, on to where the fall is steepest.

    `slope = max_o (d[corner] - d[o]) / (r[o] - r[corner])`, at most `options` rounds.
    """
    sites = np.arange(len(rate))
    start = np.lexsort((distortion, rate), axis=-1)[:, 0]
    at, last = start, np.full(len(rate), np.inf)
    rounds = []
    while True:
        added = rate - rate[sites, at][:, None]
        saved = distortion[sites, at][:, None] - distortion
        falls = (added > 0) & (saved > 0)
        slopes = np.divide(saved, added, out=np.zeros_like(saved), where=falls)
        slope = slopes.max(1)
        if not slope.any():
            break
        farthest = np.where(slopes == slope[:, None], rate, -1.0).argmax(1)
        moved = np.flatnonzero(slope)
        last = np.minimum(slope, last)  # rounding must not put a site's steps out of order
        rounds.append((moved, farthest[moved], added[moved, farthest[moved]], last[moved]))
        at = np.where(slope > 0, farthest, at)
    empty = (sites[:0], sites[:0], rate[0, :0], rate[0, :0])
    site, option, more, fall = (np.concatenate(parts) for parts in zip(empty, *rounds, strict=True))
    order = np.argsort(-fall, kind="stable")
    return Hull(start, site[order], option[order], more[order], fall[order])
