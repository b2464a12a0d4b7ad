"""From computed steps to plan entries: what serves every other step, with its corrections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cacheplan.errors import InfeasibleError
from cacheplan.schedules.groups import Group
from cacheplan.schedules.planned import Serving
from cacheplan.schedules.tables import Gram, statistic
from cacheplan.types import (
    DiffusionSpec,
    FeatureAction,
    FeatureEntry,
    FeatureProfile,
    FeatureRecipe,
    FeatureSite,
)

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
_DIGITS = 6  # of channel vectors: files stay small, and float32 knows little more
_SLOPES = (0.5, 2.0)  # beyond these a channel hardly varies
_RIDGE = 1e-3


def keys_before(spec: DiffusionSpec, computed: Mask, step: int) -> list[int]:
    """Steps computed by the denoiser that runs at `step`, newest first."""
    start = max((s for s in spec.expert_starts if s <= step), default=0)
    return [s for s in range(step - 1, start - 1, -1) if computed[s]]


def entries(
    profile: FeatureProfile, recipe: FeatureRecipe, found: Sequence[Group], computed: Mask
) -> tuple[FeatureEntry, ...]:
    """The plan entries of a published recipe; its groups compute the steps `computed` `[S, T]`."""
    made = []
    for group, row in zip(found, computed, strict=True):
        for step in np.flatnonzero(~row).tolist():
            keys = keys_before(profile.model, row, step)
            for site in group.at(profile.model, step):
                made.append(
                    FeatureEntry(
                        site=site, step=step, action=_action(profile, recipe, site, step, keys)
                    )
                )
    return ordered(made)


def ordered(made: list[FeatureEntry]) -> tuple[FeatureEntry, ...]:
    return tuple(sorted(made, key=lambda e: (e.step, e.site.first, e.site.last, e.site.part)))


def _action(
    profile: FeatureProfile,
    recipe: FeatureRecipe,
    site: FeatureSite,
    step: int,
    keys: list[int],
) -> FeatureAction:
    order = min(recipe.order, len(keys) - 1)
    action = (
        FeatureAction(do="forecast", order=order, basis=recipe.basis)
        if order
        else FeatureAction(do="reuse")
    )
    if recipe.correction == "none":
        return action
    gram = Gram.of(profile, site)
    weights = gram.weights(recipe.basis, order, step, keys) if order else (1.0,)
    if recipe.correction == "scalar":
        return replace(action, scale=_slope(gram, step, keys, weights))
    slope, shift = channel_fit(profile, step, keys, weights)
    return replace(
        action,
        channel_scale=tuple(round(float(a), _DIGITS) for a in slope),
        channel_shift=tuple(round(float(b), _DIGITS) for b in shift),
    )


def _slope(gram: Gram, step: int, keys: list[int], weights: Sequence[float]) -> float:
    """The least squares factor of the forecast."""
    at, w = keys[: len(weights)], np.asarray(weights)
    cross = float(w @ gram.products[at, step])
    square = float(w @ gram.products[np.ix_(at, at)] @ w)
    return cross / square if np.isfinite(cross) and square > 0 else 1.0


def channel_fit(
    profile: FeatureProfile, step: int, keys: list[int], weights: Sequence[float]
) -> tuple[Floats, Floats]:
    """Least squares slope and intercept of every channel, `[C]` each, of the whole site.

    CacheQuant (arXiv 2503.01323, section 4.2): `a = cov(X, Y) / var(X)`, `b = E Y - a E X` for the
    forecast X and the truth Y, here both with the same denominator and a light pull to a = 1
    where a channel hardly varies.
    """
    table, mean = statistic(profile, "channel_gram"), statistic(profile, "channel_mean")
    at, w = keys[: len(weights)], np.asarray(weights)
    if step - at[-1] >= table.shape[2]:
        raise InfeasibleError(
            f"Step {step} is served from step {at[-1]}, {step - at[-1]} steps before, but only "
            f"{table.shape[2] - 1} were measured: profile with more --lags."
        )
    cross = sum(x * table[:, step, step - k] for x, k in zip(w, at, strict=True))
    square = np.zeros(len(table))
    for x, k in zip(w, at, strict=True):
        for y, m in zip(w, at, strict=True):
            square += x * y * table[:, max(k, m), abs(k - m)]
    expected = sum(x * mean[:, k] for x, k in zip(w, at, strict=True))
    variance = np.maximum(square - expected**2, 0)
    covariance = cross - expected * mean[:, step]
    ridge = _RIDGE * float(variance.mean()) + 1e-12
    slope = np.clip((covariance + ridge) / (variance + ridge), *_SLOPES)
    scale = float(statistic(profile, "scale"))  # channel means are relative to the site's size
    return slope, (mean[:, step] - slope * expected) * scale


def serving_entries(profile: FeatureProfile, serving: Serving) -> tuple[FeatureEntry, ...]:
    """The plan entries of the planner: least squares weights of the last two computed steps.

    Only steps that are computed whole count: at a partial one the runtime keeps nothing of a site
    some of whose blocks are left out.
    """
    made: list[FeatureEntry] = []
    for step in np.flatnonzero(~serving.computed).tolist():
        option = serving.options[int(serving.served[step])]
        keys = keys_before(profile.model, serving.computed, step)[:2]
        fitted = Gram.of(profile, option.site, serving.ridge).fitted(step, keys)
        weights = tuple(round(weight, 9) for weight in fitted)
        action = FeatureAction(
            do="forecast", basis="fitted", order=len(weights) - 1, weights=weights
        )
        made.append(FeatureEntry(site=option.site, step=step, action=action))
    return ordered(made)
