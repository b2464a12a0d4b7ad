"""What a plan means step by step, without any model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cacheplan.errors import UnsupportedError
from cacheplan.plans.io import read_plan
from cacheplan.runtime.features.program import Program
from cacheplan.types import DiffusionSpec, FeatureEntry, FeaturePlan, FeatureSite

MakeEntry = Callable[..., FeatureEntry]
MakePlan = Callable[..., FeaturePlan]

MLP = FeatureSite(part="mlp", first=1, last=2)
RANGE = FeatureSite(part="delta", first=0, last=2)
ALL = FeatureSite(part="hidden", first=0, last=3)


@pytest.fixture(scope="module")
def spec() -> DiffusionSpec:
    plan = read_plan(Path(__file__).parents[1] / "plans" / "golden_features.json")
    assert isinstance(plan, FeaturePlan)
    return plan.model  # eight steps, three blocks


def keys(program: Program, site: FeatureSite) -> list[int]:
    return [t for t in range(program.spec.steps) if program.computed(site, t)]


def stored(program: Program, site: FeatureSite) -> list[int]:
    return [t for t in range(program.spec.steps) if site in program.stores(t, promoted=False)]


def test_a_feature_is_computed_where_all_of_its_blocks_run(
    spec: DiffusionSpec, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    entries = [
        entry("mlp", 1, 2, 1),
        entry("delta", 0, 2, 2),
        entry("hidden", 0, 3, 4),
        entry("mlp", 1, 2, 6),
        entry("delta", 1, 3, 7),
    ]
    program = Program(feature_plan(spec, entries))
    assert keys(program, MLP) == [0, 3, 5]
    assert keys(program, RANGE) == [0, 1, 3, 5, 6]  # at 1 and 6 a part within it is kept
    assert keys(program, ALL) == [0, 1, 3, 5, 6]


def test_only_features_that_are_used_later_are_stored(
    spec: DiffusionSpec, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    entries = [
        entry("mlp", 1, 2, 3),
        entry("mlp", 1, 2, 6, "forecast", basis="taylor", order=1),
        entry("mlp", 1, 2, 7, "forecast", basis="taylor", order=1),
    ]
    program = Program(feature_plan(spec, entries))
    assert stored(program, MLP) == [2, 4, 5]
    assert program.last_use[MLP] == [0, 0, 3, 0, 7, 7, 7, 0]
    assert program.most[MLP] == 2
    left_out = Program(feature_plan(spec, [entry("delta", 0, 2, 5, "skip")]))
    assert stored(left_out, RANGE) == []


def test_features_do_not_cross_to_another_denoiser(
    spec: DiffusionSpec, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    block = spec.blocks[0]
    second = tuple(replace(block, path=f"transformer_2.{b.path}") for b in spec.blocks)
    two = replace(spec, blocks=(*spec.blocks, *second), expert_starts=(4,))
    program = Program(feature_plan(two, [entry("hidden", 0, 6, 5, "forecast", basis="newton")]))
    site = program.sites[0]
    assert stored(program, site) == [4]
    assert list(program.span(site, 3)) == [0, 1, 2]
    assert list(program.span(site, 4)) == [3, 4, 5]
    with pytest.raises(UnsupportedError, match="another denoiser runs"):
        Program(feature_plan(two, [entry("mlp", 1, 2, 5)]))


def test_fitted_weights_need_as_many_features(
    spec: DiffusionSpec, entry: MakeEntry, feature_plan: MakePlan
) -> None:
    fitted = {"basis": "fitted", "order": 1, "weights": (1.5, -0.5)}
    with pytest.raises(UnsupportedError, match="combines 2 features of mlp of block 1 at step 1"):
        Program(feature_plan(spec, [entry("mlp", 1, 2, 1, "forecast", **fitted)]))
    program = Program(feature_plan(spec, [entry("mlp", 1, 2, 2, "forecast", scale=2.0, **fitted)]))
    action = program.actions[2][MLP]
    assert program.weights(action, 2, [1, 0]) == (3.0, -1.0)
