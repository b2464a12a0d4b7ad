"""Corrections and weights that a plan's entries carry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cacheplan.errors import InfeasibleError
from cacheplan.recipes import FEATURE_RECIPES
from cacheplan.schedules.groups import groups, head, runs
from cacheplan.schedules.planned import Serving, options
from cacheplan.schedules.realize import channel_fit, entries, keys_before, serving_entries
from cacheplan.schedules.tables import Gram
from cacheplan.types import FeatureSite

T, C = 6, 3
Floats = NDArray[np.float64]
HIDDEN = FeatureSite(part="hidden", first=0, last=4)


def affine() -> Floats:
    """`[T, M, C]`: step 3 is twice step 2 plus 1, in every channel and token."""
    F = 5 * np.random.default_rng(0).normal(size=(T, 50, C))
    F[3] = 2 * F[2] + 1
    return F


def corrected(F: Floats, step: int, made: Floats, slope: Floats, shift: Floats) -> float:
    return float(((slope * made + shift - F[step]) ** 2).mean())


def test_an_affine_change_is_undone(synthetic_profiles: Any) -> None:
    F = affine()
    profile = synthetic_profiles.build(T, trajectory=lambda site: F.copy())
    slope, shift = channel_fit(profile, 3, [2], (1.0,))
    np.testing.assert_allclose(slope, 2, rtol=2e-3)
    np.testing.assert_allclose(shift, 1, rtol=2e-2)
    assert corrected(F, 3, F[2], slope, shift) < 1e-4 * ((F[3] - F[2]) ** 2).mean()
    recipe = FEATURE_RECIPES["cachequant"]
    computed = np.array([[True, True, True, False, True, True]])
    (entry,) = entries(profile, recipe, groups(profile, recipe), computed)
    assert (entry.step, entry.action.do) == (3, "reuse")
    np.testing.assert_allclose(entry.action.channel_scale, slope, atol=1e-6)
    np.testing.assert_allclose(entry.action.channel_shift, shift, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_correction_never_hurts(synthetic_profiles: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    F = rng.normal(size=(T, 40, C)) * np.exp(3 * rng.normal(size=C)) + rng.normal(size=C)
    F[:, :, 0] = rng.normal()  # a channel without variance
    profile = synthetic_profiles.build(T, trajectory=lambda site: F.copy())
    for step, keys, weights in ((3, [2], (1.0,)), (5, [4, 1], (1.5, -0.5)), (4, [3, 2], (1.0, 0))):
        made = sum(w * F[k] for k, w in zip(keys, weights, strict=True))
        slope, shift = channel_fit(profile, step, keys, weights)
        assert ((slope >= 0.5) & (slope <= 2)).all()
        before = ((made - F[step]) ** 2).mean((0,))
        after = ((slope * made + shift - F[step]) ** 2).mean((0,))
        assert (after <= before + 1e-9 * (F**2).mean()).all()
        best = np.stack([np.polyfit(made[:, c], F[step, :, c], 1) for c in range(1, C)])
        free = (best[:, 0] > 0.5) & (best[:, 0] < 2) & (made[:, 1:].var(0) > made.var(0).max() / 9)
        np.testing.assert_allclose(slope[1:][free], best[free, 0], rtol=0.02)


def test_corrections_need_their_lags(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(T, lags=2)
    channel_fit(profile, 4, [2], (1.0,))
    with pytest.raises(InfeasibleError, match="served from step 1, 3 steps before, but only 2"):
        channel_fit(profile, 4, [1], (1.0,))


def test_a_scalar_correction_is_the_best_factor(synthetic_profiles: Any) -> None:
    F = affine()
    profile = synthetic_profiles.build(T, trajectory=lambda site: F.copy())
    recipe = FEATURE_RECIPES["ertacache"]
    computed = np.array([[True, True, True, False, False, True]])
    made = entries(profile, recipe, groups(profile, recipe), computed)
    assert [e.step for e in made] == [3, 4]
    for entry in made:
        best = (F[2] * F[entry.step]).sum() / (F[2] ** 2).sum()
        assert entry.action.scale == pytest.approx(best)
        assert entry.action.do == "reuse"
    forecast = replace(recipe, basis="newton", order=1)
    entry = entries(profile, forecast, groups(profile, forecast), computed)[0]
    weights = Gram.of(profile, entry.site).weights("newton", 1, 3, [2, 1])
    x = weights[0] * F[2] + weights[1] * F[1]
    assert entry.action.scale == pytest.approx((x * F[3]).sum() / (x**2).sum())
    assert (entry.action.do, entry.action.basis, entry.action.order) == ("forecast", "newton", 1)


def test_forecasts_have_the_order_that_is_possible(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(T)
    recipe = replace(FEATURE_RECIPES["dpcache"], order=2)
    computed = np.array([[True, False, True, False, True, False]])
    actions = [e.action for e in entries(profile, recipe, groups(profile, recipe), computed)]
    assert [(a.do, a.basis, a.order) for a in actions] == [
        ("reuse", "hold", 0),
        ("forecast", "taylor", 1),
        ("forecast", "taylor", 2),
    ]


def test_keys_are_those_of_the_denoiser_that_runs(synthetic_profiles: Any) -> None:
    computed = np.array([True, True, False, True, False, True])
    assert keys_before(synthetic_profiles.spec(T, 2), computed, 5) == [3, 1, 0]
    spec = synthetic_profiles.spec(T, 2, starts=(3,))
    assert keys_before(spec, computed, 5) == [3]
    assert keys_before(spec, computed, 4) == [3]
    assert keys_before(spec, computed, 3) == []
    assert keys_before(spec, computed, 2) == [1, 0]


def test_entries_are_of_the_denoiser_that_runs(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(T, 2, starts=(3,))
    recipe = FEATURE_RECIPES["fora"]
    found = groups(profile, recipe)
    assert found[0].cost == pytest.approx(4 * 45 / (T * 220))
    computed = np.array([[True, False, True, True, True, False]])
    made = entries(profile, recipe, found, computed)
    assert [(e.step, e.site.first, e.site.part) for e in made] == [
        (step, first, part)
        for step, blocks in ((1, (0, 1)), (5, (2, 3)))
        for first in blocks
        for part in ("attention", "mlp")
    ]
    whole = FeatureSite(part="hidden", first=0, last=4)
    across = FeatureSite(part="delta", first=1, last=3)
    for step in range(T):
        assert runs(profile.model, whole, step)
        assert not runs(profile.model, across, step)


def serve(profile: Any, served: list[int]) -> Serving:
    row = np.array(served)
    return Serving(options(profile), row < 0, row, 0.0, 0.0, 0.0)


def test_partial_steps_are_no_keys(synthetic_profiles: Any) -> None:
    """Coarser sites take their weights from the steps that were computed whole."""
    profile = synthetic_profiles.build(8)
    menu = [o.site for o in options(profile)]
    assert [(s.part, s.first) for s in menu] == [
        *(("hidden", 0), ("model", 0), ("delta", 1), ("delta", 2), ("delta", 3))
    ]
    #   computed, computed, tail from 2, hidden, tail from 1, computed, model, hidden
    made = serving_entries(profile, serve(profile, [-1, -1, 3, 0, 2, -1, 1, 0]))
    assert [(e.step, menu.index(e.site)) for e in made] == [(2, 3), (3, 0), (4, 2), (6, 1), (7, 0)]
    for entry, keys in zip(made, ([1, 0], [1, 0], [1, 0], [5, 1], [5, 1]), strict=True):
        action = entry.action
        fitted = Gram.of(profile, entry.site).fitted(entry.step, keys)
        assert action.weights == pytest.approx(fitted, abs=1e-9)
        assert (action.do, action.basis, action.order) == ("forecast", "fitted", 1)


def test_one_key_is_fitted_alone(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(8, 2, starts=(4,))
    made = serving_entries(profile, serve(profile, [-1, 0, -1, 1, -1, 0, -1, 0]))
    assert [len(e.action.weights) for e in made] == [1, 2, 1, 2]


def test_groups(synthetic_profiles: Any) -> None:
    profile = synthetic_profiles.build(T)
    rows = FEATURE_RECIPES

    def shapes(name: str) -> list[int]:
        return [len(group.sites) for group in groups(profile, rows[name])]

    assert shapes("fora") == [8]
    assert shapes("smoothcache") == [4, 4]
    assert shapes("bac") == [1] * 8
    assert shapes("uniform") == shapes("magcache") == shapes("scm") == [1]
    blocks = groups(profile, replace(rows["fora"], sites="blocks"))
    assert [(s.part, s.first) for s in blocks[0].sites] == [("delta", b) for b in range(4)]
    assert [group.cost for group in blocks] == [pytest.approx(400 / (T * 420))]


def test_heads_of_deep_models_are_measured_ones(synthetic_profiles: Any) -> None:
    make = synthetic_profiles
    for blocks, wanted, found in ((4, 8, 1), (8, 8, 2), (16, 8, 4), (40, 8, 8), (40, 3, 3)):
        assert head(make.build(2, blocks), wanted) == found
    # only every eighth tail of a model of sixty blocks is measured
    few = make.build(2, 60, only=lambda s: s.last < 60 or s.first in (0, 1, 7, 15) or not s.first)
    assert head(few, 8) == 7
