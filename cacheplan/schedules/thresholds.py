"""Thresholds of online gates: what spends the budget on average over the calibration prompts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cacheplan.errors import UnsupportedError
from cacheplan.schedules.tables import between, site_index, statistic
from cacheplan.solvers.fitting import Fitted, fit
from cacheplan.types import FeatureProfile, FeatureSite, Gate, Schedule

Mask = NDArray[np.bool_]


def fit_gate(profile: FeatureProfile, gate: Gate, schedule: Schedule) -> Fitted:
    """The threshold that spends the schedule's budget, and the steps it would compute.

    The gate is run on the mean signals of the calibration prompts; single prompts differ, so the
    budget is what is expected, not what is promised.
    """
    signals: dict[str, Callable[[], Callable[[list[int], int], float]]] = {
        "first_block": lambda: _first_block(profile, gate.blocks),
        "secant": lambda: _secant(profile),
    }
    if gate.signal not in signals:
        raise UnsupportedError(
            f'The threshold of a "{gate.signal}" gate cannot be found from a profile: choose '
            f"a recipe with one of {', '.join(signals)}."
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
    """relL1 of the first blocks' delta against the last computed step (FBCache, DBCache)."""
    sites = [FeatureSite(part="delta", first=b, last=b + 1) for b in range(blocks)]
    tables = np.mean([statistic(profile, "l1")[site_index(profile, s)] for s in sites], axis=0)
    distance = between(tables)

    def signal(keys: list[int], step: int) -> float:
        return float(distance[keys[0], step] / max(tables[keys[0], 0], 1e-12))

    return signal


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
