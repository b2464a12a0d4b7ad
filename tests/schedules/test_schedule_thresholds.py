"""Thresholds of gates that spend a budget on the calibration prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cacheplan.errors import InfeasibleError, UnsupportedError
from cacheplan.plans.rescale import rescaled
from cacheplan.recipes import FEATURE_RECIPES
from cacheplan.schedules.groups import groups
from cacheplan.schedules.keys import problem
from cacheplan.schedules.thresholds import fit_gate, fit_rescale
from cacheplan.types import FeatureProfile, FeatureRecipe, FeatureSite, Gate, Rescale

T = 20
Mask = NDArray[np.bool_]


def fitted(
    profile: FeatureProfile, recipe: FeatureRecipe, kept: float, **changes: Any
) -> tuple[float, Mask]:
    assert recipe.gate is not None
    found = problem(profile, recipe, groups(profile, recipe), kept)
    if recipe.gate.signal == "modulation":
        changes = {"rescale": fit_rescale(profile), **changes}
    result = fit_gate(profile, replace(recipe.gate, **changes), found)
    assert (result.computed == result.computed[0]).all()
    return result.threshold, result.computed[0]


@pytest.mark.parametrize("name", ["fbcache", "dbcache", "cg_taylor", "teacache", "easycache"])
def test_budgets_are_spent_and_more_computes_more(synthetic_profiles: Any, name: str) -> None:
    recipe, profile = FEATURE_RECIPES[name], synthetic_profiles.build(T)
    before, most = 0, np.inf
    for kept in (0.6, 0.7, 0.8, 0.9):
        threshold, computed = fitted(profile, recipe, kept, blocks=1)
        cost = groups(profile, recipe)[0].cost
        reached = 1 - cost * (T - computed.sum())
        assert cost <= 1 / T + 1e-12
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


def test_several_first_blocks_are_one_residual(synthetic_profiles: Any) -> None:
    """DBCache compares what they add together: here each of them jumps, and the jumps cancel."""
    jump = np.where(np.arange(T) >= 10, 50.0, 0.0)
    level = {(0, 1): jump + 1, (1, 2): 1 - jump, (0, 2): np.full(T, 2.0)}

    def trajectory(site: FeatureSite) -> Any:
        values = level.get((site.first, site.last), np.arange(1.0, T + 1))
        return np.asarray(values)[:, None, None] * np.ones((1, 6, 3))

    profile = synthetic_profiles.build(T, trajectory=trajectory)
    _, computed = fitted(profile, FEATURE_RECIPES["dbcache"], 0.7, blocks=2, max_consecutive=None)
    assert np.flatnonzero(computed).tolist() == [0, 1, 2, 3]
    _, computed = fitted(profile, FEATURE_RECIPES["dbcache"], 0.7, blocks=1, max_consecutive=None)
    assert np.flatnonzero(computed).tolist() == [0, 1, 2, 3, 10]


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


def test_forecasts_are_lines_through_the_last_two_computed(synthetic_profiles: Any) -> None:
    """CG-Taylor: mean |line - truth| over mean |truth|, after seven steps and before the last."""
    rng = np.random.default_rng(0)
    first = np.cumsum(np.cumsum(rng.normal(size=(T, 6, 3)), 0), 0) + 5
    profile = synthetic_profiles.build(T, first=first)
    recipe = FEATURE_RECIPES["cg_taylor"]
    threshold, computed = fitted(profile, recipe, 0.75)
    keys = list(range(7))
    for step in range(7, T - 1):
        i, j = keys[-2:]
        line = first[j] + (step - j) * (first[j] - first[i]) / (j - i)
        error = np.abs(line - first[step]).mean() / np.abs(first[step]).mean()
        assert computed[step] == (not error < threshold)
        keys += [step] if computed[step] else []
    assert computed[-1]
    assert 8 < computed.sum() < T


def test_forecasts_that_were_not_measured(synthetic_profiles: Any) -> None:
    profile, recipe = synthetic_profiles.build(T, lags=3), FEATURE_RECIPES["cg_taylor"]
    _, computed = fitted(profile, recipe, 0.85)
    keys = np.flatnonzero(computed)
    for step in range(7, T):
        older = keys[keys < step][-2]
        assert computed[step] or step - older <= 3


def test_a_steady_input_is_computed_at_even_steps(synthetic_profiles: Any) -> None:
    """TeaCache: with the same change at every step the sum grows by the same amount."""
    modulated = (1.1 ** np.arange(T))[:, None, None] * np.ones((1, 6, 3))
    outputs = (1.2 ** np.arange(T))[:, None, None] * np.ones((1, 6, 3))
    profile = synthetic_profiles.build(T, modulated=modulated, outputs=outputs)
    curve = fit_rescale(profile)
    assert curve.low == pytest.approx(0.1)
    assert rescaled(curve, 0.1) == pytest.approx(0.2)
    threshold, computed = fitted(profile, FEATURE_RECIPES["teacache"], 0.5)
    keys = np.flatnonzero(computed)
    stretch = keys[1]
    assert stretch > 1
    assert keys.tolist() == [*range(0, T - 1, stretch), T - 1]
    assert 0.2 * (stretch - 1) < threshold <= 0.2 * stretch + 1e-6


def test_the_polynomial_is_that_of_the_steps(synthetic_profiles: Any) -> None:
    """Where the output's change is a polynomial of the input's, that one is found."""
    x = np.linspace(0.02, 0.3, T - 1)[np.random.default_rng(0).permutation(T - 1)]
    y = 0.3 + 2 * x - 9 * x**2 + 30 * x**4

    def grown(change: Any) -> Any:
        return np.cumprod([1.0, *(1 + change)])[:, None, None] * np.ones((1, 6, 3))

    profile = synthetic_profiles.build(T, modulated=grown(x), outputs=grown(y))
    curve = fit_rescale(profile)
    np.testing.assert_allclose(curve.coefficients, [30, 0, -9, 2, 0.3], atol=1e-5)
    assert (curve.low, curve.high) == pytest.approx((0.02, 0.3))


@pytest.mark.parametrize(
    ("at", "value"), [(0.0, 0.264), (0.05, 0.181), (0.2, 0.262), (0.3, 0.522), (0.4, 2.276)]
)
def test_the_published_polynomial_for_flux(at: float, value: float) -> None:
    curve = Rescale(coefficients=(498.65, -283.78, 55.86, -3.82, 0.264), low=0.0, high=0.4)
    assert rescaled(curve, at) == pytest.approx(value, abs=2e-3)
    assert rescaled(curve, 9.0) == pytest.approx(2.276, abs=2e-3)  # as at the end of the fit
    negative = Rescale(coefficients=(-1.0, 0.1), low=0.05, high=1.0)
    assert rescaled(negative, 0.5) == 0
    assert rescaled(negative, 0.0) == pytest.approx(0.05)


def test_models_without_a_known_attention_have_no_modulation(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(T)
    blocks = tuple(replace(block, parts=block.parts[1:]) for block in profile.model.blocks)
    bare = replace(profile, model=replace(profile.model, blocks=blocks))
    with pytest.raises(UnsupportedError, match=r"looks at the attention of blocks\.0"):
        fit_rescale(bare)


def test_gates_without_a_rule(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(T)
    gate = Gate(signal="other", threshold=0.0)
    recipe = replace(FEATURE_RECIPES["fbcache"], gate=gate)
    with pytest.raises(UnsupportedError, match='"other" gate cannot be found'):
        fitted(profile, recipe, 0.5)
