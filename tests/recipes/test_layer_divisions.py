"""Published divisions of a cache among layers and heads, on profiles made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cacheplan.errors import ProfileError
from cacheplan.formulate import formulate, predict, reached, realize
from cacheplan.formulate_heads import ranking_heads
from cacheplan.formulate_layers import Division, division, pyramid, split
from cacheplan.language import solve_language
from cacheplan.recipes import CANDIDATES, RECIPES
from cacheplan.solvers.classes import Classes
from cacheplan.solvers.proportional import Proportional
from cacheplan.solvers.registry import DIVISION
from cacheplan.types import (
    Budget,
    KVAction,
    KVProfile,
    LanguageSpec,
    Preference,
    Split,
    Statistic,
    TwoClasses,
    WindowAttention,
)

KEEPS = (0.1, 0.5, 1.0)
MakeProfile = Callable[..., KVProfile]


def spec_of(layers: int, heads: int = 2) -> LanguageSpec:
    return LanguageSpec(
        id="made",
        architecture="MadeForCausalLM",
        layer_kinds=("full_attention",) * layers,
        query_heads=2 * heads,
        kv_heads=heads,
        key_width=8,
        value_width=8,
        max_length=4096,
        rope="null",
        digest="sha256:" + "0" * 64,
    )


def make_profile(layers: int, length: int, **changes: NDArray[np.float64]) -> KVProfile:
    """A profile of `layers` x 2 heads; damage falls linearly and no head is special."""
    spec = spec_of(layers)
    curve = np.linspace(0, 1, 129) ** 0.3
    linear = 1.0 - np.array(KEEPS)
    arrays: dict[str, NDArray[np.float64]] = {
        "mass_curve": np.tile(curve, (layers, 1)),
        "damage": np.tile(linear, (layers, 2, len(CANDIDATES), 1)),
        "ablation_kl": np.ones((layers, 2, 1)),
        "ablation_damage": np.ones((layers, 2, 1)),
        "output_energy": np.ones((layers, 2)),
        "window_dispersion": np.ones(layers),
        "window_shift": np.ones(layers),
        "spectral_residual": np.ones(layers),
        "retrieval_score": np.ones((layers, 4)),
        "block_distance": np.linspace(0, 1, layers),
        "context_length": np.array(float(length)),
    }
    statistics = {
        name: Statistic(("x",) * value.ndim, 1, value, np.zeros_like(value))
        for name, value in (arrays | changes).items()
    }
    return KVProfile(
        model=spec,
        statistics=statistics,
        keeps=KEEPS,
        candidates=CANDIDATES,
        probes=((0, 0),),
        prompts=1,
        prompts_digest="sha256:0",
        seed=0,
    )


def tokens(profile: KVProfile, recipe: str, per_layer: int) -> list[int]:
    """What each layer keeps when `per_layer` tokens are asked on average."""
    row = RECIPES[recipe]
    length = division(profile, row, 1.0).length
    budget = Budget(asked="", kept=per_layer / length, reached=per_layer / length)
    problem = formulate(profile, row, budget)
    assert isinstance(problem, Split)
    entries = realize(profile, row, budget, DIVISION[row.allocation](problem))
    assert reached(profile, entries, None) <= budget.kept + 1e-9
    return [round(e.action.keep * length) for e in entries if isinstance(e.action, KVAction)]


def published_pyramid(capacity: int, window: int, layers: int, length: int) -> list[int]:
    """PyramidKV's budgets as its authors round them: the step is cut to an integer."""
    base = capacity - window
    least = base // 20
    most = 2 * base - least
    if most >= length - window:
        most = length - window
        least = 2 * base - most
    step = (most - least) // (layers - 1)
    return [most - step * layer + window for layer in range(layers)]


@pytest.mark.parametrize(
    ("capacity", "window", "layers", "length", "first", "last", "mean"),
    [
        (64, 8, 4, 1000, 118, 10, 64.0),
        (128, 8, 32, 8192, 242, 25, 133.5),
        (512, 32, 32, 4096, 968, 69, 518.5),
        (2048, 32, 32, 8192, 3964, 151, 2057.5),
    ],
)
def test_pyramid(
    capacity: int, window: int, layers: int, length: int, first: int, last: int, mean: float
) -> None:
    """Golden budgets: theirs exceed the mean by their rounding, ours meet it exactly."""
    theirs = published_pyramid(capacity, window, layers, length)
    assert (theirs[0], theirs[-1], sum(theirs) / layers) == (first, last, mean)
    base, room = capacity - window, length - window
    parts = Division(length, layers, base * layers, window, 0, room)
    problem = Split(
        base * layers, np.zeros(layers, int), np.full(layers, room), pyramid(parts, 20.0)
    )
    ours = Proportional()(problem).choice + window
    assert ours.sum() == capacity * layers
    assert ours[0] == first
    steps = ours[:-1] - ours[1:]
    assert steps.max() - steps.min() <= 1
    assert (np.array(theirs) >= ours).all()
    if mean == capacity:
        assert ours.tolist() == theirs == [118, 82, 46, 10]


def test_pyramid_recipe_is_the_golden_division() -> None:
    assert tokens(make_profile(4, 1000), "pyramidkv", 64) == [118, 82, 46, 10]


def test_pyramid_of_a_short_text_is_flat() -> None:
    assert tokens(make_profile(4, 100), "pyramidkv", 64) == [64] * 4


def test_cake_divides_by_preference() -> None:
    """Golden vector: preferences 4, 2, 1, 1 and 64 tokens beyond the windows."""
    profile = make_profile(
        4,
        1000,
        window_dispersion=np.array([2.0, 2.0, 1.0, 0.5]),
        window_shift=np.array([2.0, 1.0, 1.0, 2.0]),
    )
    assert tokens(profile, "cake_static", 48) == [64, 48, 40, 40]  # 32 each, and 32 16 8 8


def test_cake_preference_has_two_exponents() -> None:
    profile = make_profile(
        2, 1000, window_dispersion=np.array([4.0, 1.0]), window_shift=np.array([9.0, 1.0])
    )
    row = replace(RECIPES["cake_static"], weight=Preference(tau_dispersion=2.0, tau_shift=0.5))
    weights = split(profile, row, 0.1).weights
    assert weights is not None
    assert weights.tolist() == pytest.approx([2 * 81, 1])


# layer weights of Llama-3.1-8B in four digits, as the authors of CompressKV ship them
LLAMA_WEIGHTS = np.array(
    "184 190 363 281 280 368 261 307 442 426 439 395 182 430 374 377 303 354 346 362 "
    "420 252 346 376 340 289 284 319 222 182 234 71".split(),
    dtype=float,
)


def test_compresskv_divides_by_output_error() -> None:
    """Golden vector: 256 tokens per layer, at least 32 and at most 768."""
    recipe = RECIPES["compresskv"]
    column = CANDIDATES.index(recipe.candidates[0])
    damage = np.ones((32, 2, len(CANDIDATES), len(KEEPS)))
    damage[:, :, column] = ((LLAMA_WEIGHTS / 1e4) ** 2)[:, None, None]
    found = tokens(make_profile(32, 8192, damage=damage), "compresskv", 256)
    published = np.clip(32 + np.round(LLAMA_WEIGHTS / LLAMA_WEIGHTS.sum() * 7168), 32, 768)
    assert (min(found), max(found), sum(found)) == (83, 349, 8192)
    assert np.abs(published - found).max() <= 1


def test_compresskv_limits_hold() -> None:
    damage = np.zeros((4, 2, len(CANDIDATES), len(KEEPS)))
    damage[0] = 1.0
    found = tokens(make_profile(4, 1000, damage=damage), "compresskv", 100)
    assert found == [300, 34, 33, 33]


def test_flashcache_divides_by_spectral_residual() -> None:
    profile = make_profile(3, 1000, spectral_residual=np.array([0.2, 0.6, 0.1]))
    found = tokens(profile, "flashcache", 91)
    assert found == [1 + 60, 1 + 180, 1 + 30]


def test_epicache_divides_by_key_distance() -> None:
    """Golden vector: similarities .90, .92, .94, .96 and 1000 tokens per layer."""
    profile = make_profile(4, 8000, block_distance=1 - np.array([0.90, 0.92, 0.94, 0.96]))
    weights = split(profile, RECIPES["epicache"], 1000 / 8000).weights
    assert weights is not None
    shares = weights / weights.sum() * 4000
    assert np.floor(shares + 1e-9).tolist() == [2063, 1320, 616, 0]
    found = tokens(profile, "epicache", 1000)
    assert sum(found) == 4000, "theirs is 4249 once the least is enforced"
    assert found[-1] == 250
    assert found[:3] == np.round(shares[:3] * 3750 / 4000).tolist()


@pytest.mark.parametrize("recipe", ["pyramidkv", "cake_static", "compresskv", "flashcache"])
@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    layers=st.integers(1, 6),
    length=st.integers(16, 900),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**31),
)
def test_divisions_are_exact(
    recipe: str, layers: int, length: int, share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    names = ("window_dispersion", "window_shift", "spectral_residual", "block_distance")
    profile = make_profile(layers, length, **{name: rng.random(layers) for name in names})
    each = max(1, int(share * length))
    found = tokens(profile, recipe, each)
    assert sum(found) == each * layers
    assert min(found) >= 1
    assert max(found) <= length


def test_duoattention_meets_the_budget_as_a_share() -> None:
    rng = np.random.default_rng(3)
    profile = make_profile(4, 1000, ablation_kl=rng.random((4, 2, 1)) ** 4)
    recipe = RECIPES["duoattention"]
    for kept in (0.02, 0.3, 0.6, 1.0):
        budget = Budget(asked="", kept=kept, reached=kept)
        problem = formulate(profile, recipe, budget)
        assert isinstance(problem, TwoClasses)
        entries = realize(profile, recipe, budget, Classes()(problem))
        assert reached(profile, entries, None) == pytest.approx(kept)
        shares = {e.action.keep for e in entries if isinstance(e.action, KVAction)}
        assert len(shares - {1.0}) <= 1
        predicted = predict(profile, entries)
        assert predicted is not None
        assert predicted == pytest.approx(Classes()(problem).value)


def test_duoattention_keeps_the_heads_that_matter_most() -> None:
    matters = np.full((3, 2, 1), 1e-6)
    matters[1, 0] = matters[2, 1] = 1.0
    profile = make_profile(3, 1000, ablation_kl=matters)
    budget = Budget(asked="", kept=0.4, reached=0.4)
    problem = formulate(profile, RECIPES["duoattention"], budget)
    assert isinstance(problem, TwoClasses)
    assert Classes()(problem).choice.tolist() == [0, 0, 1, 0, 0, 1]


def test_ranking_heads_are_those_with_the_best_scores() -> None:
    scores = np.array([[0.1, 0.4, 0.3, 0.4], [0.0, 0.0, 0.0, 0.0]])
    profile = make_profile(2, 1000, retrieval_score=scores)
    assert ranking_heads(profile, 2) == [(1, 3), (0, 1)]


def test_what_was_not_measured_is_not_predicted() -> None:
    profile = make_profile(2, 1000)
    plan = solve_language(
        profile,
        budget=0.2,
        recipe="compresskv",
        solver=None,
        length=None,
        decode_every=None,
        command="",
    )
    assert plan.predicted is None
    for entry in plan.entries:
        assert isinstance(entry.action, KVAction)
        assert isinstance(entry.action.scorer, WindowAttention)
        assert entry.action.scorer.heads == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("recipe", "name", "hint"),
    [
        ("compresskv", "retrieval_score", "answers"),
        ("epicache", "block_distance", "--ablate 8"),
        ("cake_static", "window_shift", "run `cacheplan profile` again"),
    ],
)
def test_missing_statistics_are_named(recipe: str, name: str, hint: str) -> None:
    profile = make_profile(2, 1000)
    without = {k: v for k, v in profile.statistics.items() if k != name}
    with pytest.raises(ProfileError, match=f'"{name}".*{hint}'):
        tokens(replace(profile, statistics=without), recipe, 100)


def test_a_profile_that_does_not_know_the_recipe_is_refused() -> None:
    profile = make_profile(2, 1000)
    with pytest.raises(ProfileError, match="did not measure"):
        tokens(replace(profile, candidates=profile.candidates[:1]), "flashcache", 100)
