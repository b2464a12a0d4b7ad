"""Thresholds of online gates: what spends the budget on average over the calibration prompts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.polynomial import Polynomial
from numpy.typing import NDArray

from cacheplan.errors import UnsupportedError
from cacheplan.plans.rescale import rescaled
from cacheplan.schedules.groups import whole
from cacheplan.schedules.tables import between, site_index, statistic
from cacheplan.solvers.fitting import Fitted, fit
from cacheplan.types import FeatureProfile, FeatureSite, Gate, Rescale, Schedule

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
_DEGREE = 4
_ALIKE = 1e-2  # relative width of changes that tell nothing about a curve
_INSIDE = ("first_block", "forecast", "modulation")  # signals from transformer blocks


def fit_gate(profile: FeatureProfile, gate: Gate, schedule: Schedule) -> Fitted:
    """The threshold that spends the schedule's budget, and the steps it would compute.

    The gate is run on the mean signals of the calibration prompts; single prompts differ, so the
    budget is what is expected, not what is promised.
    """
    signals: dict[str, Callable[[], Callable[[list[int], int], float]]] = {
        "first_block": lambda: _first_block(profile, gate.blocks),
        "forecast": lambda: _forecast(profile, gate.order),
        "modulation": lambda: _modulation(profile, gate.rescale),
        "secant": lambda: _secant(profile),
    }
    if gate.signal not in signals:
        raise UnsupportedError(
            f'The threshold of a "{gate.signal}" gate cannot be found from a profile: choose '
            f"a recipe with one of {', '.join(signals)}."
        )
    if gate.signal in _INSIDE and whole(profile).part == "branch":
        raise UnsupportedError(
            f'The "{gate.signal}" gate looks at transformer blocks, but '
            f"{profile.model.architecture} is a UNet: choose a recipe for the whole model, such "
            'as "planned".'
        )
    signal = signals[gate.signal]()

    def rule(threshold: float) -> Mask:
        row = schedule.forced[0].copy()
        row[0] = True
        keys, total, skipped = [0], 0.0, 0
        for step in range(1, len(row)):
            value = signal(keys, step)
            total = total + value if gate.accumulate == "sum" else value
            capped = gate.max_consecutive is not None and skipped >= gate.max_consecutive
            if row[step] or capped or not total < threshold:
                row[step] = True
                fresh = step in profile.model.expert_starts  # the gate forgets the other denoiser
                keys, total, skipped = [step, *([] if fresh else keys)], 0.0, 0
            else:
                skipped += 1
        return np.tile(row, (len(schedule.forced), 1))

    return fit(schedule, rule)


def _first_block(profile: FeatureProfile, blocks: int) -> Callable[[list[int], int], float]:
    """relL1 against the last computed step of what the first blocks add together.

    FBCache's residual of one block, DBCache's of several.
    """
    site = FeatureSite(part="delta", first=0, last=blocks)
    table = statistic(profile, "l1")[site_index(profile, site)]
    distance = between(table)

    def signal(keys: list[int], step: int) -> float:
        return float(distance[keys[0], step] / max(table[keys[0], 0], 1e-12))

    return signal


def _forecast(profile: FeatureProfile, order: int) -> Callable[[list[int], int], float]:
    """relL1 of the first block's output against its forecast (CG-Taylor, arXiv 2508.02240)."""
    table = statistic(profile, "forecast_l1")

    def signal(keys: list[int], step: int) -> float:
        lags = [step - key for key in keys[: order + 1]]
        if lags[-1] >= table.shape[1]:  # farther apart than what was compared
            return math.inf
        newest, older = (*lags, 0)[:2]
        return float(table[step, newest, older] / max(table[step, 0, 0], 1e-12))

    return signal


def _modulation(
    profile: FeatureProfile, curve: Rescale | None
) -> Callable[[list[int], int], float]:
    """Change of the modulated input since the step before, rescaled (TeaCache)."""
    assert curve is not None
    changes = from_step_to_step(statistic(profile, "modulated_l1"))
    return lambda keys, step: rescaled(curve, float(changes[step]))


def fit_rescale(profile: FeatureProfile) -> Rescale:
    """The polynomial of degree 4 from changes of the modulated input to those of the output.

    TeaCache (Liu et al. 2024, arXiv 2411.19108) fits it to the steps of many single runs; here it
    is fitted to the steps' means over the calibration prompts.
    """
    first = profile.model.blocks[0]
    if all(part.name != "attention" for part in first.parts):
        raise UnsupportedError(
            f'The "modulation" gate looks at the attention of {first.path}, which has none that is '
            'known here: choose a recipe for the whole model, such as "planned".'
        )
    x = from_step_to_step(statistic(profile, "modulated_l1"))
    y = from_step_to_step(statistic(profile, "output_l1"))
    known = [s for s in range(1, len(x)) if s not in profile.model.expert_starts]
    x, y = x[known], y[known]
    low, high = float(x.min()), float(x.max())
    middle, half = (low + high) / 2, (high - low) / 2
    if half <= _ALIKE * middle:  # nothing to tell apart
        return Rescale(coefficients=(float(y.mean()),), low=low, high=high)
    powers = np.vander((x - middle) / half, min(_DEGREE, len(x) - 1) + 1, increasing=True)
    found = np.linalg.lstsq(powers, y, rcond=1e-9)[0]
    curve = Polynomial(found, domain=[low, high]).convert(domain=[-1, 1])
    return Rescale(coefficients=tuple(map(float, curve.coef[::-1])), low=low, high=high)


def from_step_to_step(table: Floats) -> Floats:
    """`[T]`: `|F_t - F_{t-1}| / |F_{t-1}|`, from `[T, lags + 1]`; 0 at the first step."""
    found = np.zeros(len(table))
    found[1:] = table[1:, 1] / np.maximum(table[:-1, 0], 1e-12)
    return found


def _secant(profile: FeatureProfile) -> Callable[[list[int], int], float]:
    """EasyCache (arXiv 2507.02860): `k |x_t - x_{t-1}| / |v_s|`.

    `k = |v_s - v_r| / |x_s - x_r|` is from the last two computed steps r < s.
    """
    latents, outputs = statistic(profile, "latent_l1"), statistic(profile, "output_l1")
    x, v = between(latents), between(outputs)

    def signal(keys: list[int], step: int) -> float:
        if len(keys) < 2:
            return math.inf
        newest, before = keys[:2]
        if not math.isfinite(x[before, newest]):  # farther apart than what was compared
            return math.inf
        secant = v[before, newest] / max(x[before, newest], 1e-12)
        return float(secant * latents[step, 1] / max(outputs[newest, 0], 1e-12))

    return signal
