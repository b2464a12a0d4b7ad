"""Thresholds of gates that spend a budget on the calibration prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cacheplan.errors import InfeasibleError, UnsupportedError
from cacheplan.recipes import FEATURE_RECIPES
from cacheplan.schedules.groups import groups
from cacheplan.schedules.keys import problem
from cacheplan.schedules.thresholds import fit_gate
from cacheplan.types import FeatureProfile, FeatureRecipe, Gate

T = 20
Mask = NDArray[np.bool_]


def fitted(
    profile: FeatureProfile, recipe: FeatureRecipe, kept: float, **changes: Any
) -> tuple[float, Mask]:
    assert recipe.gate is not None
    found = problem(profile, recipe, groups(profile, recipe), kept)
    result = fit_gate(profile, replace(recipe.gate, **changes), found)
    assert (result.computed == result.computed[0]).all()
    return result.threshold, result.computed[0]


@pytest.mark.parametrize("name", ["fbcache", "dbcache", "easycache"])
def test_budgets_are_spent_and_more_computes_more(synthetic_profiles: Any, name: str) -> None:
    recipe, profile = FEATURE_RECIPES[name], synthetic_profiles.build(T)
    before, most = 0, np.inf
    for kept in (0.6, 0.7, 0.8, 0.9):
        threshold, computed = fitted(profile, recipe, kept, blocks=1)
        cost = groups(profile, recipe)[0].cost
        reached = 1 - cost * (T - computed.sum())
        assert reached <= kept + 1e-9
        assert computed.sum() >= before
        assert threshold <= most
        assert computed[: recipe.warmup].all()
        assert computed[-1] or not recipe.protect_last
        before, most = computed.sum(), threshold
    threshold, computed = fitted(profile, recipe, 1.0, blocks=1)
    assert threshold == -1  # nothing is below
    assert computed.all()


def test_infinite_thresholds_skip_all_that_is_free(synthetic_profiles: Any) -> None:
    """The smallest budget is that of warm-up, protected steps and runs of limited length."""
    profile, recipe = synthetic_profiles.build(T), FEATURE_RECIPES["dbcache"]
    least = 1 - groups(profile, recipe)[0].cost * (T - 4 - 4)  # 4 warm, then one in four
    with pytest.raises(InfeasibleError, match="smallest feasible"):
        fitted(profile, recipe, least - 1e-6, blocks=1)
    _, computed = fitted(profile, recipe, least + 1e-6, blocks=1)
    keys = np.flatnonzero(computed)
    assert keys[:4].tolist() == [0, 1, 2, 3]
    assert len(keys) == 8
    assert np.diff(keys).max() == 4


def test_first_block_changes_are_relative_to_the_last_computed(synthetic_profiles: Any) -> None:
    """A first block that grows by equal steps, one of them large."""
    level = np.arange(1.0, T + 1) + np.where(np.arange(T) >= 10, 50, 0)
    values = level[:, None, None] * np.ones((1, 6, 3))
    profile = synthetic_profiles.build(T, trajectory=lambda site: values.copy())
    recipe = FEATURE_RECIPES["fbcache"]
    threshold, computed = fitted(profile, recipe, 0.6)
    keys = 0
    for step in range(1, T):
        change = abs(level[step] - level[keys]) / level[keys]
        assert computed[step] == (not change < threshold)
        keys = step if computed[step] else keys
    assert computed[10]


def test_linear_models_have_their_factor_as_secant(synthetic_profiles: Any) -> None:
    """EasyCache's k of v = c x is |c|: the expected change is that of the latent."""
    rng = np.random.default_rng(0)
    c, x = -3.0, np.cumsum(rng.normal(size=(T, 6, 3)), 0) + 2
    profile = synthetic_profiles.build(T, latents=x, outputs=c * x)
    recipe = FEATURE_RECIPES["easycache"]
    threshold, computed = fitted(profile, recipe, 0.6)
    key, total = 4, 0.0
    for step in range(5, T - 1):
        change = np.abs(x[step] - x[step - 1]).mean()
        total += abs(c) * change / np.abs(c * x[key]).mean()
        assert computed[step] == (not total < threshold)
        if computed[step]:
            key, total = step, 0.0
    assert computed[-1]


def test_secants_that_were_not_measured(synthetic_profiles: Any) -> None:
    """Keys farther apart than the lags tell nothing, so the step is computed."""
    profile, recipe = synthetic_profiles.build(T, lags=2), FEATURE_RECIPES["easycache"]
    _, computed = fitted(profile, recipe, 0.7)
    keys = np.flatnonzero(computed)
    far = keys[1:][np.diff(keys) > 2]
    assert all(computed[step + 1] for step in far if step + 1 < T)


def test_denoisers_that_take_turns_are_not_compared(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(T, 2, starts=(10,))
    _, computed = fitted(profile, FEATURE_RECIPES["easycache"], 0.7)
    assert computed[10:12].all()  # two computed steps make the first secant


def test_gates_without_a_rule(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(T)
    gate = Gate(signal="modulation", threshold=0.0)
    recipe = replace(FEATURE_RECIPES["fbcache"], gate=gate)
    with pytest.raises(UnsupportedError, match='"modulation" gate cannot be found'):
        fitted(profile, recipe, 0.5)
