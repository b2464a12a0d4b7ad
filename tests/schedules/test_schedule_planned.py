"""The planner against everything that could be planned."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cacheplan.errors import InfeasibleError
from cacheplan.schedules.planned import Option, Serving, options, plan_at, plan_steps, tails
from cacheplan.schedules.tables import RIDGE
from cacheplan.types import FeatureProfile, FeatureSite

Mask = NDArray[np.bool_]
BUDGETS = (0.2, 0.35, 0.5, 0.65, 0.8)


def small(make: Any, steps: int, seed: int, **fields: Any) -> FeatureProfile:
    """Three options: the whole, the model, and the tail of one of two blocks."""
    rough = make.smooth(steps, seed, noise=0.1)
    profile: FeatureProfile = make.build(steps, 2, trajectory=rough, **fields)
    return profile


def first_only(steps: int, *others: int) -> Mask:
    forced = np.zeros(steps, np.bool_)
    forced[[0, *others]] = True
    return forced


def score(menu: tuple[Option, ...], starts: Any, computed: Any, served: Any) -> tuple[float, float]:
    """Damage and rate of a schedule, from the options' tables."""
    T = len(computed)
    damage, rate, keys = 0.0, 0.0, list[int]()
    for step in range(T):
        if computed[step]:
            keys = [step, *([] if step in starts else keys)]
            rate += 1 / T
            continue
        option = menu[served[step]]
        rate += option.rate
        damage += (
            option.single[keys[0], step] if len(keys) == 1 else option.pair[keys[1], keys[0], step]
        )
    return damage, rate


def everything(profile: FeatureProfile, forced: Mask) -> NDArray[np.float64]:
    """`[schedules, 2]`: damage and rate of all."""
    T, menu, starts = profile.model.steps, options(profile), profile.model.expert_starts
    found = []
    for computed in itertools.product((True, False), repeat=T):
        if np.any(forced & ~np.array(computed)):
            continue
        open_steps = [step for step in range(T) if not computed[step]]
        for chosen in itertools.product(range(len(menu)), repeat=len(open_steps)):
            served = dict(zip(open_steps, chosen, strict=True))
            found.append(score(menu, starts, computed, served))
    return np.array(found)


def check(profile: FeatureProfile, serving: Serving, forced: Mask, kept: float) -> None:
    starts = profile.model.expert_starts
    damage, rate = score(serving.options, starts, serving.computed, serving.served)
    assert serving.damage == pytest.approx(damage, rel=1e-12, abs=1e-15)
    assert serving.rate == pytest.approx(rate, rel=1e-12)
    assert serving.rate <= kept + 1e-9
    assert not (forced & ~serving.computed).any()
    np.testing.assert_array_equal(serving.served < 0, serving.computed)
    assert 0 <= serving.bound <= serving.damage


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("others", [(), (1, 5)])
def test_it_is_between_the_bound_and_the_best(
    synthetic_profiles: Any, seed: int, others: tuple[int, ...]
) -> None:
    profile, forced = small(synthetic_profiles, 6, seed), first_only(6, *others)
    assert len(options(profile)) == 3
    schedules = everything(profile, forced)
    for kept in BUDGETS:
        within = schedules[schedules[:, 1] <= kept + 1e-9, 0]
        if not within.size:
            with pytest.raises(InfeasibleError):
                plan_at(profile, forced, kept, RIDGE)
            continue
        serving = plan_at(profile, forced, kept, RIDGE)
        check(profile, serving, forced, kept)
        best = within.min()
        assert serving.bound <= best * (1 + 1e-9) + 1e-12
        assert best * (1 - 1e-9) - 1e-12 <= serving.damage <= 1.15 * best + 1e-12


def test_seven_steps(synthetic_profiles: Any) -> None:
    profile, forced = small(synthetic_profiles, 7, 9), first_only(7)
    schedules = everything(profile, forced)
    found = [plan_at(profile, forced, kept, RIDGE) for kept in BUDGETS]
    best = [schedules[schedules[:, 1] <= kept + 1e-9, 0].min() for kept in BUDGETS]
    for serving, damage, kept in zip(found, best, BUDGETS, strict=True):
        check(profile, serving, forced, kept)
        assert serving.bound <= damage * (1 + 1e-9)
        assert damage * (1 - 1e-9) <= serving.damage <= 1.15 * damage


@pytest.mark.parametrize("seed", range(3))
def test_more_budget_never_hurts(synthetic_profiles: Any, seed: int) -> None:
    make = synthetic_profiles
    profile = make.build(14, 4, trajectory=make.smooth(14, seed, noise=0.05))
    forced = first_only(14)
    found = [plan_steps(profile, forced, kept) for kept in np.linspace(0.15, 1, 18)]
    damages = [serving.damage for serving in found]
    for before, after in itertools.pairwise(damages):
        assert after <= before * (1 + 1e-9) + 1e-12
    for before, after in itertools.pairwise(serving.bound for serving in found):
        assert after <= before * (1 + 1e-6) + 1e-12
    assert found[-1].computed.all()
    assert (found[-1].damage, found[-1].bound) == (0, 0)
    assert found[-1].rate == pytest.approx(1)


@pytest.mark.parametrize("lags", [2, 3, 7])
@pytest.mark.parametrize("others", [(), (1, 2, 7)])
def test_the_smallest_feasible_budget_is_told(
    synthetic_profiles: Any, lags: int, others: tuple[int, ...]
) -> None:
    profile, forced = small(synthetic_profiles, 8, 0, lags=lags), first_only(8, *others)
    with pytest.raises(InfeasibleError, match="smallest feasible budget is") as error:
        plan_steps(profile, forced, 0.01)
    told = re.search(r"([0-9.]+)\.$", str(error.value))
    assert told is not None
    smallest = float(told[1])
    check(profile, plan_steps(profile, forced, smallest), forced, smallest)
    with pytest.raises(InfeasibleError, match=re.escape(told[1])):
        plan_steps(profile, forced, smallest - 0.002)


def test_features_that_stand_still_are_free(synthetic_profiles: Any) -> None:
    still = np.random.default_rng(0).normal(size=(1, 6, 3))
    ones = np.ones((1, 8))
    profile = synthetic_profiles.build(
        8,
        2,
        trajectory=lambda site: np.tile(still, (8, 1, 1)),
        final_damage=ones,
        output_damage=ones,
    )
    serving = plan_steps(profile, first_only(8), 0.3)
    assert serving.damage < 1e-5


def test_denoisers_that_take_turns(synthetic_profiles: Any) -> None:
    profile = small(synthetic_profiles, 6, 3, starts=(3,))
    assert tails(profile) == [FeatureSite(part="delta", first=b, last=b + 1) for b in (1, 3)]
    menu, forced = options(profile), first_only(6, 3)
    schedules = everything(profile, forced)
    for kept in (0.4, 0.6, 0.8):
        serving = plan_at(profile, forced, kept, RIDGE)
        check(profile, serving, forced, kept)
        within = schedules[schedules[:, 1] <= kept + 1e-9, 0]
        assert serving.bound <= within.min() * (1 + 1e-9)
        assert within.min() * (1 - 1e-9) <= serving.damage <= 1.15 * within.min()
        for step in np.flatnonzero(~serving.computed).tolist():
            site = menu[serving.served[step]].site
            assert site.part != "delta" or (site.first >= 2) == (step >= 3)


def test_it_spends_on_what_matters(synthetic_profiles: Any) -> None:
    """Where the final latent hardly minds, steps are skipped; where it does, they are computed."""
    make = synthetic_profiles
    line = np.arange(12.0)[:, None, None] ** 1.5 * np.ones((1, 6, 3))
    minds = np.where(np.arange(12) >= 6, 1e4, 1e-4)
    profile = make.build(12, 2, trajectory=lambda site: line.copy())
    damage = profile.statistics["final_damage"].mean[0]
    profile = make.build(12, 2, trajectory=lambda site: line.copy(), final=damage * minds)
    computed = plan_steps(profile, first_only(12), 0.6).computed
    assert computed[6:].sum() > computed[1:6].sum()


def test_much_damage_is_planned_again_with_its_noise(synthetic_profiles: Any) -> None:
    make = synthetic_profiles
    profile = make.build(14, 4, trajectory=make.smooth(14, 1, noise=0.05))
    forced = first_only(14)
    once = plan_at(profile, forced, 0.3, RIDGE)
    again = plan_steps(profile, forced, 0.3)
    drift = min(once.damage, 1.0) ** 2
    assert drift > RIDGE
    assert again.ridge == drift
    assert again.damage == plan_at(profile, forced, 0.3, drift).damage
    assert plan_steps(profile, forced, 1.0).ridge == RIDGE
