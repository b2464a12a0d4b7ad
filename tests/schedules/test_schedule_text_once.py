"""The planner where keys and values of the text are computed once per denoiser."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cacheplan.errors import InfeasibleError
from cacheplan.formulate_features import plan_features, plan_for, searched
from cacheplan.plans.compute import full_flops, planned_flops
from cacheplan.recipes import FEATURE_RECIPES
from cacheplan.schedules.planned import plan_at, plan_steps
from cacheplan.schedules.realize import keys_before, serving_entries
from cacheplan.schedules.tables import RIDGE
from cacheplan.types import FeaturePlan, FeatureProfile, TextProjections

TEXT = TextProjections(paths=("to_k", "to_v"), cost=30, size=4, given=2)
PLANNED = FEATURE_RECIPES["planned"]


def made(
    make: Any, steps: int, *, starts: Sequence[int] = (), seed: int = 0, **statistics: Any
) -> FeatureProfile:
    """A profile of blocks of cost 100, of which 30 are the text's keys and values."""
    rough = make.smooth(steps, seed, noise=0.1)
    profile: FeatureProfile = make.build(steps, 2, starts=starts, trajectory=rough, **statistics)
    blocks = tuple(
        replace(block, parts=(replace(block.parts[0], text=TEXT), *block.parts[1:]))
        for block in profile.model.blocks
    )
    return replace(profile, model=replace(profile.model, blocks=blocks))


def share(profile: FeatureProfile, entries: Any, *, text_once: bool) -> float:
    plan = FeaturePlan(
        model=profile.model,
        recipe="planned",
        budget=None,  # type: ignore[arg-type]
        entries=entries,
        text_once=text_once,
        certificate=None,  # type: ignore[arg-type]
        predicted=None,
        measured=None,
        provenance=None,  # type: ignore[arg-type]
    )
    return planned_flops(plan) / full_flops(profile.model)


@pytest.mark.parametrize("starts", [(), (3,)])
@pytest.mark.parametrize("kept", [0.4, 0.55, 0.7, 1.0])
def test_what_is_reached_is_what_is_computed(
    synthetic_profiles: Any, starts: tuple[int, ...], kept: float
) -> None:
    profile = made(synthetic_profiles, 8, starts=starts)
    forced = np.zeros(8, np.bool_)
    forced[[0, *starts]] = True
    plain, once = (
        plan_steps(profile, forced, kept, text_once=text_once) for text_once in (False, True)
    )
    for serving, text_once in ((plain, False), (once, True)):
        reached = share(profile, serving_entries(profile, serving), text_once=text_once)
        assert serving.rate == pytest.approx(reached, rel=1e-12)
        assert serving.rate <= kept + 1e-9
        assert serving.bound <= serving.damage
    assert once.damage <= plain.damage
    if kept < 1:
        assert once.computed.sum() + (once.served > 1).sum() > plain.computed.sum()
    else:
        assert once.rate == pytest.approx(1 - 60 * (8 - 1 - len(starts)) / (8 * 220))


def test_the_bound_holds_for_every_schedule(synthetic_profiles: Any) -> None:
    T = 6
    profile = made(synthetic_profiles, T, seed=3)
    forced = np.zeros(T, np.bool_)
    forced[0] = True
    for kept in (0.35, 0.5, 0.65):
        serving = plan_at(profile, forced, kept, RIDGE, text_once=True)
        best = np.inf
        for rest in itertools.product((True, False), repeat=T - 1):
            computed = np.array((True, *rest))
            left_out = np.flatnonzero(~computed).tolist()
            for chosen in itertools.product(range(3), repeat=len(left_out)):
                flops, damage = 220 + (computed.sum() - 1) * 160, 0.0
                for step, index in zip(left_out, chosen, strict=True):
                    option = serving.options[index]
                    # the ends, nothing, and with the first block less its text
                    flops += (20, 0, 90)[index]
                    keys = keys_before(profile.model, computed, step)[:2]
                    table = option.single if len(keys) == 1 else option.pair
                    damage += float(table[(*keys[::-1], step)])
                if flops / (T * 220) <= kept + 1e-9:
                    best = min(best, damage)
        assert serving.bound <= best * (1 + 1e-9)
        assert best * (1 - 1e-9) <= serving.damage <= 1.15 * best


def test_the_smallest_budget_counts_the_text(synthetic_profiles: Any) -> None:
    profile = made(synthetic_profiles, 8, lags=3)
    forced = np.zeros(8, np.bool_)
    forced[0] = True
    with pytest.raises(InfeasibleError, match=r"at least 3 of 8 .* is 0\.307\."):
        plan_steps(profile, forced, 0.01, text_once=True)  # (220 + 2 * 160) / (8 * 220)
    assert plan_steps(profile, forced, 0.307, text_once=True).computed.sum() == 3


@pytest.mark.parametrize(
    ("statistics", "once"),
    [({"text_constant": 1.0}, True), ({"text_constant": 1 - 2**-40}, False), ({}, False)],
)
def test_only_a_text_that_was_the_same_throughout_is_read_once(
    synthetic_profiles: Any, statistics: dict[str, Any], once: bool
) -> None:
    profile = made(synthetic_profiles, 8, **statistics)
    found = plan_features(profile, PLANNED, 0.5)
    assert found.text_once == once
    assert found.reached == pytest.approx(share(profile, found.entries, text_once=once))
    assert not plan_features(profile, FEATURE_RECIPES["uniform"], 0.5).text_once
    assert not plan_features(profile, replace(PLANNED, text_once=False), 0.5).text_once
    schedule, _ = searched(profile, PLANNED, 0.5)
    assert schedule.base.sum() + 8 * schedule.rate.sum() == pytest.approx(
        share(profile, (), text_once=once)
    )
    computed = np.zeros((1, 8), np.bool_)
    computed[0, [0, 2, 5]] = True
    given = plan_for(profile, PLANNED, computed, 0.5)
    assert given is not None
    assert given.text_once == once
    assert given.reached == pytest.approx(share(profile, given.entries, text_once=once))
