"""Costs of reuse and forecast, in closed form from the inner products that a profile holds.

For keys K and weights w the mean square error of a forecast of step t is
`G_tt - 2 sum_i w_i G_ti + sum_ij w_i w_j G_ij`; the least squares weights solve `G_KK w = G_Kt`.
Everything is relative to the site's own mean square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from cacheplan.errors import ProfileError
from cacheplan.plans.forecast import weights
from cacheplan.types import FeatureProfile, FeatureSite

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
RIDGE = 3e-4  # of the keys' mean square: what calibration prompts say of others, at best
_LEAST = 1e-12
_TRUSTED = 0.75  # of the logarithm of a step's sensitivity over the mean: see `sensitivity`


def statistic(profile: FeatureProfile, name: str) -> Floats:
    """The mean of a statistic; raises ProfileError if it is absent or not usable."""
    if name not in profile.statistics:
        raise ProfileError(
            f'The profile has no statistic "{name}": run `cacheplan profile` again'
            + (" with --ablate 2." if name.startswith("final") else ".")
        )
    mean = profile.statistics[name].mean
    if not np.isfinite(mean).all():
        raise ProfileError(
            f'The statistic "{name}" holds NaN or infinity: run `cacheplan profile` again.'
        )
    return mean


def site_index(profile: FeatureProfile, site: FeatureSite) -> int:
    if site not in profile.sites:
        raise ProfileError(
            f"The profile did not measure {site.part} of blocks {site.first} to {site.last - 1}: "
            "run `cacheplan profile` again with this release."
        )
    return profile.sites.index(site)


def between(table: Floats) -> Floats:
    """From `[T, lags + 1]` (step, steps back) to `[T, T]` (earlier, step), `inf` beyond."""
    T, width = table.shape
    found = np.full((T, T), np.inf)
    for lag in range(min(width, T)):
        steps = np.arange(lag, T)
        found[steps - lag, steps] = table[steps, lag]
    return found


@dataclass(frozen=True, eq=False)
class Gram:
    """Inner products of one site's features between all steps, `[T, T]`, NaN beyond the lags."""

    products: Floats
    sigmas: tuple[float, ...]
    starts: tuple[int, ...]  # where another denoiser takes over
    ridge: float = RIDGE

    @staticmethod
    def of(profile: FeatureProfile, site: FeatureSite, ridge: float = RIDGE) -> Gram:
        table = between(statistic(profile, "gram")[site_index(profile, site)])
        table[np.isinf(table)] = np.nan
        upper = np.where(np.isnan(table), 0, table)
        full = upper + np.triu(upper, 1).T
        full[np.isnan(table) & np.isnan(table.T)] = np.nan
        return Gram(full, profile.model.sigmas, profile.model.expert_starts, ridge)

    @property
    def steps(self) -> int:
        return len(self.products)

    def error(self, step: int, keys: Sequence[int], weight: Sequence[float]) -> float:
        """Mean square error at `step` of the features at `keys`, weighted; `inf` where unknown."""
        if any(min(keys) < start <= step for start in self.starts):
            return float("inf")
        at, w = list(keys), np.asarray(weight)
        found = (
            self.products[step, step]
            - 2 * w @ self.products[at, step]
            + w @ self.products[np.ix_(at, at)] @ w
        )
        return float("inf") if np.isnan(found) else max(float(found), 0.0)

    def fitted(self, step: int, keys: Sequence[int]) -> tuple[float, ...]:
        """Least squares weights of the features at `keys`, newest first."""
        at = list(keys)
        own = self.products[np.ix_(at, at)]
        ridge = self.ridge * np.trace(own) / len(at) + _LEAST
        # towards plain reuse: what cannot be told apart is taken from the newest
        target = self.products[at, step] + ridge * (np.arange(len(at)) == 0)
        found = np.linalg.solve(own + ridge * np.eye(len(at)), target)
        return tuple(float(w) for w in found)

    def weights(self, basis: str, order: int, step: int, keys: Sequence[int]) -> tuple[float, ...]:
        """The weights of a basis; "fitted" by least squares."""
        if basis == "fitted":
            return self.fitted(step, keys[: order + 1])
        return weights(basis, order, keys, step, self.sigmas)

    def hold(self) -> Floats:
        """`[T, T]`: error of reusing the feature of step j at step t, `inf` where j >= t."""
        square = np.diag(self.products)
        found = square[:, None] + square[None, :] - 2 * self.products
        return self._ordered(np.maximum(found, 0))

    def forecast(self, basis: str, order: int) -> Floats:
        """`[T, T, T]`: error at step t of a forecast from keys i < j, `inf` out of order.

        Where another denoiser has taken over between i and j, only j is known: it is reused.
        """
        T, G = self.steps, self.products
        i, j, t = (axis.ravel() for axis in np.meshgrid(*3 * [np.arange(T)], indexing="ij"))
        ordered = (i < j) & (j < t) & ~np.isnan(G[i, t])
        i, j, t = i[ordered], j[ordered], t[ordered]
        if basis == "fitted":
            newest, older = self._fitted_pairs(i, j, t)
        else:
            newest, older = _pair_weights(basis, order, T, self.sigmas)[i, j, t].T
        error = (
            G[t, t]
            - 2 * (newest * G[j, t] + older * G[i, t])
            + newest**2 * G[j, j]
            + older**2 * G[i, i]
            + 2 * newest * older * G[i, j]
        )
        found = np.full((T, T, T), np.inf)
        found[i, j, t] = np.maximum(error, 0)
        held = self.hold()
        for start in self.starts:
            found[:start, :, start:] = np.inf
            found[:start, start:, start:] = held[start:, start:]
        return found

    def _fitted_pairs(self, i: Indices, j: Indices, t: Indices) -> tuple[Floats, Floats]:
        """`fitted` for many pairs of keys at once."""
        G = self.products
        ridge = self.ridge * (G[j, j] + G[i, i]) / 2 + _LEAST
        a, b, c = G[j, j] + ridge, G[i, j], G[i, i] + ridge
        right, left = G[j, t] + ridge, G[i, t]
        determinant = a * c - b * b
        return (c * right - b * left) / determinant, (a * left - b * right) / determinant

    def _ordered(self, found: Floats) -> Floats:
        step = np.arange(self.steps)
        found = np.where(np.isnan(found) | (step[:, None] >= step), np.inf, found)
        for start in self.starts:
            found[:start, start:] = np.inf
        return found


@lru_cache(maxsize=4)
def _pair_weights(basis: str, order: int, T: int, sigmas: tuple[float, ...]) -> Floats:
    """`[T, T, T, 2]`: weights of the keys j and i < j at step t, the same for all sites."""
    found = np.zeros((T, T, T, 2))
    for i, j, t in combinations(range(T), 3):
        found[i, j, t] = (*weights(basis, order, (j, i), t, sigmas), 0.0)[:2]
    return found


def sensitivity(profile: FeatureProfile, *, of: str = "final_damage") -> Floats:
    """`[T]`: squared relative error of the final latent per unit of a step's error.

    Of the error of the feature that was held ("final_damage"), or of the change of the model's
    output that this made ("output_damage").

    Summed over prompts before dividing; smoothed over neighbouring steps and drawn towards their
    geometric mean, since few prompts are ablated, one step at a time: what differs by orders of
    magnitude differs less on other prompts and under a plan.  (On two trained pipelines this
    halved the error at three tenths of the computation, or did no harm.)  Steps that cannot be held
    get the value of their neighbour.
    """
    error, damage = statistic(profile, "final_error")[0], statistic(profile, of)[0]
    known = damage > 0
    ratio = np.full(len(error), np.nan)
    ratio[known] = np.log(np.maximum(error[known], _LEAST) / damage[known])
    if not known.any():
        raise ProfileError("No step could be held alone: run `cacheplan profile` again.")
    steps = np.arange(len(ratio))
    filled = np.interp(steps, steps[known], ratio[known])
    padded = np.pad(filled, 1, mode="edge")
    smooth = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
    mean = smooth.mean()
    found: Floats = np.exp(mean + _TRUSTED * (smooth - mean))
    return found
