"""Costs in closed form against the features themselves."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cacheplan.errors import ProfileError
from cacheplan.plans.forecast import weights
from cacheplan.schedules.tables import Gram, between, sensitivity, site_index, statistic
from cacheplan.types import FeatureSite

T = 8
HIDDEN = FeatureSite(part="hidden", first=0, last=4)
Floats = NDArray[np.float64]
SIGMAS = tuple(np.linspace(1, 0, T + 1) ** 1.5)


RIDGE = 1e-6  # so small that the fit is nearly exact


def gram(features: Floats, *, lags: int = T, starts: tuple[int, ...] = ()) -> Gram:
    T = len(features)
    flat = features.reshape(T, -1)
    products = flat @ flat.T / flat.shape[1]
    far = np.abs(np.arange(T)[:, None] - np.arange(T)) > lags
    return Gram(np.where(far, np.nan, products), SIGMAS[: T + 1], starts, ridge=RIDGE)


def walk(seed: int, T: int = T) -> Floats:
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.normal(size=(T, 5, 3)), 0) + rng.normal(size=(5, 3))


def square(features: Floats, step: int, keys: Any, weight: Any) -> float:
    """Mean square error of a forecast, from the features."""
    made = sum(w * features[k] for k, w in zip(keys, weight, strict=True))
    return float(((features[step] - made) ** 2).mean())


@pytest.mark.parametrize("seed", range(3))
def test_errors_are_those_of_the_features(seed: int) -> None:
    F, rng = walk(seed), np.random.default_rng(seed)
    table = gram(F)
    hold, pairs = table.hold(), table.forecast("newton", 1)
    for j, t in combinations(range(T), 2):
        assert hold[j, t] == pytest.approx(square(F, t, [j], [1.0]))
        for i in range(j):
            newton = weights("newton", 1, (j, i), t, SIGMAS)
            assert pairs[i, j, t] == pytest.approx(square(F, t, [j, i], newton))
    for keys in ([4], [5, 2], [6, 3, 0]):
        w = rng.normal(size=len(keys)).tolist()
        assert table.error(7, keys, w) == pytest.approx(square(F, 7, keys, w))
    assert np.isinf(hold[np.tril_indices(T)]).all()
    assert all(np.isinf(pairs[a, b, c]) for a in range(T) for b in range(a + 1) for c in range(T))
    assert all(np.isinf(pairs[a, b, c]) for b in range(T) for a in range(b) for c in range(b + 1))


@pytest.mark.parametrize("basis", ["hold", "taylor", "newton", "hermite"])
def test_bases_are_those_of_the_runtime(basis: str) -> None:
    table = gram(walk(1))
    found = table.forecast(basis, 1)
    for i, j, t in combinations(range(T), 3):
        w = weights(basis, 1, (j, i), t, SIGMAS)
        assert table.weights(basis, 1, t, [j, i]) == w
        assert found[i, j, t] == pytest.approx(table.error(t, [j, i], w), abs=1e-12)
    assert table.weights("fitted", 1, 5, [4, 2, 0]) == table.fitted(5, [4, 2])


@pytest.mark.parametrize("seed", range(4))
def test_fitted_weights_are_the_best(seed: int) -> None:
    F = walk(seed)
    table, rng = gram(F), np.random.default_rng(seed)
    pairs = table.forecast("fitted", 1)
    for i, j, t in combinations(range(T), 3):
        keys = [j, i]
        found = table.fitted(t, keys)
        error = table.error(t, keys, found)
        assert pairs[i, j, t] == pytest.approx(error, rel=1e-6, abs=1e-12)
        A = F[keys].reshape(2, -1).T
        best = np.linalg.lstsq(A, F[t].ravel(), rcond=None)[0]
        assert error == pytest.approx(square(F, t, keys, best), rel=1e-4)
        ridge = RIDGE * np.trace(table.products[np.ix_(keys, keys)]) / 2
        others = [(1.0, 0.0), weights("newton", 1, keys, t, SIGMAS), tuple(rng.normal(size=2))]
        for other in others:
            pull = ridge * ((other[0] - 1) ** 2 + other[1] ** 2)
            assert error <= table.error(t, keys, other) + pull + 1e-12
    assert table.error(7, [5, 3, 1], table.fitted(7, [5, 3, 1])) <= pairs[3, 5, 7] + 1e-9


def test_lines_and_parabolas() -> None:
    at = np.array(SIGMAS[:T])[:, None, None]
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 1, 5, 3))
    line, parabola = gram(a + b * at), gram(a + b * at + c * at**2)
    ordered = np.isfinite(line.forecast("newton", 1))
    assert ordered.sum() == T * (T - 1) * (T - 2) / 6
    assert line.forecast("newton", 1)[ordered].max() < 1e-12
    assert line.forecast("fitted", 1)[ordered].max() < 1e-6  # the ridge
    assert parabola.forecast("newton", 1)[ordered].max() > 1e-3
    three = parabola.weights("newton", 2, 6, [5, 3, 0])
    assert parabola.error(6, [5, 3, 0], three) < 1e-12
    constant = gram(np.ones((T, 5, 3)))
    assert constant.fitted(5, [3, 1]) == pytest.approx((1, 0), abs=1e-3) or sum(
        constant.fitted(5, [3, 1])
    ) == pytest.approx(1)
    assert constant.error(5, [3, 1], constant.fitted(5, [3, 1])) < 1e-12


def test_what_is_beyond_the_lags_is_infinite() -> None:
    table = gram(walk(0), lags=3)
    hold, pairs = table.hold(), table.forecast("fitted", 1)
    for j, t in combinations(range(T), 2):
        assert np.isfinite(hold[j, t]) == (t - j <= 3)
        assert table.error(t, [j], [1.0]) == pytest.approx(hold[j, t])
        for i in range(j):
            assert np.isfinite(pairs[i, j, t]) == (t - i <= 3)
    assert table.error(7, [6, 3], [1.0, 0.0]) == np.inf


def test_features_end_with_their_denoiser() -> None:
    F = walk(0)
    table = gram(F, starts=(4,))
    hold, pairs = table.hold(), table.forecast("fitted", 1)
    for j, t in combinations(range(T), 2):
        crosses = j < 4 <= t
        assert np.isinf(hold[j, t]) == crosses
        assert np.isinf(table.error(t, [j], [1.0])) == crosses
        for i in range(j):
            assert np.isinf(pairs[i, j, t]) == crosses
            if i < 4 <= j:  # only j is known to the denoiser that runs: it is held
                assert pairs[i, j, t] == hold[j, t]
    assert table.error(6, [5, 3], [1.0, 0.0]) == np.inf


def test_tables_by_lag() -> None:
    table = np.arange(1.0, 13).reshape(4, 3)
    inf = np.inf
    np.testing.assert_array_equal(
        between(table),
        [[1, 5, 9, inf], [inf, 4, 8, 12], [inf, inf, 7, 11], [inf, inf, inf, 10]],
    )


@pytest.mark.parametrize("lags", [2, T - 1])
def test_a_profile_gives_the_same_products(synthetic_profiles: Any, lags: int) -> None:
    make = synthetic_profiles
    profile = make.build(T, lags=lags)
    F = make.smooth(T)(HIDDEN)
    expected = gram(F / (F**2).mean() ** 0.5, lags=lags)
    found = Gram.of(profile, HIDDEN)
    np.testing.assert_allclose(found.products, expected.products)
    assert (found.sigmas, found.starts) == (profile.model.sigmas, ())


def test_sensitivity_is_error_per_damage(synthetic_profiles: Any) -> None:
    make = synthetic_profiles
    damage = np.abs(np.sin(np.arange(T))) + 0.1
    damage[0] = 0

    def found(ratio: Floats) -> Floats:
        error = np.where(damage > 0, damage * ratio, 0)
        return sensitivity(make.build(T, final=error, final_damage=damage[None]))

    np.testing.assert_allclose(found(np.full(T, 3.0)), 3.0)
    falling = np.exp(-0.7 * np.arange(T))  # geometric means of neighbours keep it
    steps = np.diff(np.log(found(falling)[2:-1]))
    np.testing.assert_allclose(steps, -0.7 * 0.75)  # drawn towards the mean
    spike = np.where(np.arange(T) == 4, 16.0, 1.0)
    shape = found(spike) / found(spike)[0]
    np.testing.assert_allclose(shape[3:6], np.array([2, 4, 2]) ** 0.75)
    unknown = damage * (np.arange(T) != 4)  # a denoiser's first step is not held
    error = 3 * unknown
    profile = make.build(T, final=error, final_damage=unknown[None])
    np.testing.assert_allclose(sensitivity(profile), 3.0)


def test_profiles_that_are_not_usable(synthetic_profiles: Any) -> None:
    make = synthetic_profiles
    still = make.build(T, final_damage=np.zeros((1, T)))
    with pytest.raises(ProfileError, match="No step could be held alone"):
        sensitivity(still)
    bad = make.build(T, final=np.full(T, np.nan))
    with pytest.raises(ProfileError, match='"final_error" holds NaN or infinity: run `cacheplan'):
        sensitivity(bad)
    profile = make.build(T)
    del profile.statistics["final_error"], profile.statistics["l1"]
    with pytest.raises(ProfileError, match=r'no statistic "final_error".*with --ablate 2'):
        statistic(profile, "final_error")
    with pytest.raises(ProfileError, match=r'no statistic "l1": run `cacheplan profile` again\.$'):
        statistic(profile, "l1")
    with pytest.raises(ProfileError, match="did not measure delta of blocks 1 to 2"):
        site_index(profile, FeatureSite(part="delta", first=1, last=3))
