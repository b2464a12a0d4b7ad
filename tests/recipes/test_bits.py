"""Few bits in plans: exact optima, bytes within the budget, published sizes and methods."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.errors import InfeasibleError, ProfileError
from cacheplan.formulate_bits import knapsack_of_bits, menu
from cacheplan.language import solve_language
from cacheplan.plans.rows import cache_bytes, full_bytes, kept_rows
from cacheplan.plans.storage import bare, packed, row_storage, tier_bytes
from cacheplan.readings_bits import FewBits, byte_share, row_bytes_near
from cacheplan.recipes import CANDIDATES, RECIPES
from cacheplan.recipes.bits import (
    K2,
    K2_FINE,
    K4,
    K8,
    MODEL,
    V2,
    V4,
    V8,
    by_channel,
    by_token,
    demoting,
    joint_checks,
    measured_precisions,
)
from cacheplan.types import (
    Budget,
    KVAction,
    KVPlan,
    KVProfile,
    KVRecipe,
    LanguageSpec,
    Precision,
    Statistic,
    Tier,
)

LENGTH = 400
KIVI = Tier(key=RECIPES["kivi"].candidates[0].key, value=RECIPES["kivi"].candidates[0].value)
KEEPS = (0.02, 0.1, 0.25, 0.5, 1.0)
BITS = [
    name
    for name, row in RECIPES.items()
    if row.formats or any(packed(c.key) or packed(c.value) or c.low for c in row.candidates)
]


def spec_of(layers: int = 2, width: int = 32) -> LanguageSpec:
    return LanguageSpec(
        id="made",
        architecture="MadeForCausalLM",
        layer_kinds=("full_attention",) * layers,
        query_heads=4,
        kv_heads=2,
        key_width=width,
        value_width=width,
        max_length=4096,
        rope="null",
        digest="sha256:" + "0" * 64,
    )


def make_profile(seed: int = 0, *, bits: bool = True) -> KVProfile:
    """Two layers of two heads with random damage, which falls with more tokens and more bits."""
    spec, rng = spec_of(), np.random.default_rng(seed)
    L, K, A = 2, 2, len(CANDIDATES)
    keys, values = measured_precisions(RECIPES.values(), spec) if bits else ((), ())
    demoted = demoting(RECIPES.values(), CANDIDATES) if bits else ()
    falling = (1 - np.array(KEEPS)) ** 2
    coarse = {t: rng.uniform(0.2, 1.0, (L, K, 1)) for t in (0, 1)}
    arrays: dict[str, Any] = {
        "damage": rng.uniform(1, 3, (L, K, A, 1)) * falling,
        "ablation_kl": rng.uniform(0.1, 1, (L, K, 3)),
        "ablation_damage": np.ones((L, K, 3)),
        "context_length": np.array(float(LENGTH)),
    }
    if bits:
        arrays |= {
            "key_damage": coarse[0] * [4.0 ** -(p.bits - 2) for p in keys],
            "value_damage": coarse[1] * [4.0 ** -(p.bits - 2) for p in values],
            "coarse_kl": rng.uniform(0.1, 1, (L, K, 2)),
            "coarse_damage": np.concatenate([coarse[0], coarse[1]], -1),
            "demoted_damage": np.concatenate([coarse[0], coarse[1]], -1)[:, :, None, None]
            * (rng.uniform(0.3, 0.9, (L, K, len(demoted), 1)) * falling)[..., None],
        }
    return KVProfile(
        model=spec,
        statistics={
            name: Statistic(("x",) * value.ndim, 1, value, np.zeros_like(value))
            for name, value in arrays.items()
        },
        keeps=KEEPS,
        candidates=CANDIDATES,
        probes=(),
        prompts=1,
        prompts_digest="sha256:0",
        seed=0,
        keys=keys,
        values=values,
        demoted=demoted,
        joint=joint_checks(CANDIDATES) if bits else (),
    )


PROFILE = make_profile()


def solve(budget: float, recipe: str, profile: KVProfile = PROFILE, **more: Any) -> KVPlan:
    options: dict[str, Any] = {"solver": None, "length": None, "decode_every": None}
    return solve_language(profile, budget=budget, recipe=recipe, command="", **(options | more))


def few(recipe: str) -> KVRecipe:
    """The recipe with a menu small enough to try everything."""
    row = RECIPES[recipe]
    formats = tuple(Tier(key=k, value=v) for k, v in ((K4, V4), (K2, V2), (K8, V2)))
    demotions = ((Tier(key=K4, value=V4), Tier(key=K2_FINE, value=V2)),)
    candidates = (RECIPES["snapkv"].candidates[0], RECIPES["knorm"].candidates[0])
    if recipe == "joint":
        return replace(row, candidates=candidates, formats=formats, demotions=demotions)
    return replace(row, formats=formats)


@pytest.mark.parametrize("recipe", ["joint", "kvtuner"])
@pytest.mark.parametrize("kept", [0.35, 0.26, 0.1])
def test_the_optimum_is_that_of_trying_everything(
    recipe: str, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, profile = few(recipe), replace(PROFILE, keeps=KEEPS)
    monkeypatch.setitem(RECIPES, recipe, row)
    budget = Budget(asked=str(kept), kept=kept, reached=kept, length=LENGTH)
    if recipe == "kvtuner" and kept < 0.2:
        with pytest.raises(InfeasibleError):
            solve(kept, recipe, profile)
        return
    options, bits = menu(profile, row, budget), FewBits(profile)
    share = np.array([byte_share(action, profile.model, LENGTH) for action in options])
    kl = np.stack([bits.kl(action) for action in options], -1)
    kl = kl.reshape(4, -1) if recipe == "joint" else kl.sum(1)
    sites = len(kl)
    # of options for which no other is both smaller and better, try all choices
    useful = [
        [o for o in range(len(options)) if not ((share < share[o]) & (site <= site[o])).any()]
        for site in kl
    ]
    best = min(
        sum(site[o] for site, o in zip(kl, choice, strict=True))
        for choice in itertools.product(*useful)
        if share[list(choice)].sum() / sites <= kept
    )
    plan = solve(kept, recipe, profile)
    assert plan.predicted is not None
    assert plan.predicted.kl == pytest.approx(best, rel=2e-4)
    assert plan.certificate.value == pytest.approx(plan.predicted.kl)
    assert plan.certificate.gap is not None


@settings(max_examples=25, deadline=None)
@given(
    recipe=st.sampled_from(BITS),
    kept=st.floats(0.03, 1.0),
    length=st.integers(200, 900),
)
def test_bytes_are_within_the_budget(recipe: str, kept: float, length: int) -> None:
    try:
        plan = solve(kept, recipe, length=length)
    except InfeasibleError as error:
        smallest = float(str(error).rsplit(" ", 1)[1].rstrip("."))
        assert smallest > kept
        assert solve(smallest, recipe, length=length).budget.reached <= smallest
        return
    spec = plan.model
    stored = cache_bytes(plan, length, 2)
    assert stored <= kept * full_bytes(spec, length, 2)
    assert plan.budget.reached == stored / full_bytes(spec, length, 2)
    for entry in plan.entries:
        assert isinstance(entry.action, KVAction)
        heads = slice(None) if entry.site.head is None else entry.site.head
        asked = round(entry.action.keep * length)
        assert (kept_rows(plan, length)[entry.site.layer, heads] == asked).all()


def test_bytes_hold_on_average_near_the_length() -> None:
    plan, lengths = solve(0.2, "joint"), range(300, 501)
    stored = sum(cache_bytes(plan, n, 2) for n in lengths)
    assert stored <= 0.205 * sum(full_bytes(plan.model, n, 2) for n in lengths)


@settings(max_examples=60, deadline=None)
@given(
    tier=st.sampled_from([*RECIPES["joint"].formats, KIVI]),
    low=st.sampled_from([None, *(low for _, low in RECIPES["joint"].demotions)]),
    keep=st.floats(0.01, 1.0),
    length=st.integers(1, 700),
)
def test_many_lengths_at_once(tier: Tier, low: Tier | None, keep: float, length: int) -> None:
    action = KVAction(
        keep=keep,
        key=tier.key,
        value=tier.value,
        losers="evict" if low is None else "demote",
        low=low,
    )
    spec = spec_of()
    kept = min(length, max(1, round(keep * length)))
    expected = row_storage(action, kept, length - kept, (32, 32), 2)
    assert row_bytes_near(action, spec, np.array([length])).tolist() == [expected]


def test_more_choice_is_never_predicted_worse() -> None:
    for budget in (0.5, 0.2, 0.1):
        joint, planned = solve(budget, "joint"), solve(budget, "planned")
        assert joint.predicted is not None
        assert planned.predicted is not None
        # planned takes shares of tokens, joint whole tokens: a little less
        assert joint.predicted.kl <= planned.predicted.kl * 1.02


def test_errors_are_weighed_apart_and_add_up() -> None:
    bits = FewBits(PROFILE)
    action = RECIPES["snapkv"].candidates[0]
    evicted = bits.kl(replace(action, keep=0.5))
    by_key = bits.kl(replace(action, key=by_channel(2, 32))) - bits.kl(action)
    by_value = bits.kl(replace(action, value=V2)) - bits.kl(action)
    coarse = {name: PROFILE.statistics[name].mean for name in ("coarse_kl", "coarse_damage")}
    whole = 12 * 32 / LENGTH  # tokens in full groups of 32
    np.testing.assert_allclose(by_key, coarse["coarse_kl"][..., 0] * whole)
    np.testing.assert_allclose(by_value, coarse["coarse_kl"][..., 1])
    both = bits.kl(replace(action, keep=0.5, key=K8, value=V2)) - evicted
    np.testing.assert_allclose(both - by_value, by_key / whole * 4.0**-6)


def test_each_kind_of_scorer_is_weighed_by_its_own_ablation() -> None:
    probed = CANDIDATES.index(RECIPES["snapkv"].candidates[0])
    kl = np.array([0.5, 0.25, 0.125]) * np.ones((2, 2, 3))
    ablated = Statistic(("x",) * 3, 1, kl, np.zeros_like(kl))
    other = CANDIDATES.index(RECIPES["keydiff"].candidates[0])
    profile = replace(
        PROFILE,
        probes=((probed, 1), (other, 1), (other, 2)),
        statistics=PROFILE.statistics | {"ablation_kl": ablated},
    )
    damage, bits = PROFILE.statistics["damage"].mean, FewBits(profile)
    for name, weight in (("snapkv", 0.5), ("keydiff", 0.375 / 2), ("knorm", 0.875 / 3)):
        action = RECIPES[name].candidates[0]
        drawn = (weight + 0.03 * 0.875 / 3) / 1.03  # a little towards the mean over all kinds
        expected = drawn * damage[:, :, CANDIDATES.index(action), 1]
        np.testing.assert_allclose(bits.kl(replace(action, keep=KEEPS[1])), expected)


def test_demoting_to_the_same_precision_is_keeping_all_in_it() -> None:
    bits = FewBits(PROFILE)
    action = RECIPES["snapkv"].candidates[0]
    tier = Tier(key=by_token(4), value=V4)
    all_in_it = replace(action, key=tier.key, value=tier.value)
    for keep in KEEPS[1:-1]:
        demoted = replace(all_in_it, keep=keep, losers="demote", low=tier)
        np.testing.assert_allclose(bits.kl(demoted), bits.kl(all_in_it))


@pytest.mark.parametrize(("group", "bits"), [(32, 3.0), (64, 2.5), (128, 2.25)])
def test_golden_bits_of_groups(group: int, bits: float) -> None:
    """KIVI: 2 bits, a scale and a zero of 16 bits for each group."""
    tier = Tier(key=by_channel(2, group), value=by_token(2, group))
    stored = tier_bytes(tier, 1024, (128, 128), 2)
    assert stored * 8 / (1024 * 256) == bits


@pytest.mark.parametrize(("high", "percent"), [(None, 32.5), (8, 23.125), (4, 18.125), (2, 15.625)])
def test_golden_sizes_of_two_tiers(high: int | None, percent: float) -> None:
    """MiKV: a fifth of the tokens in more bits, the others in 2, groups of 64 channels."""
    precision = MODEL if high is None else by_token(high, 64)
    tiers = (
        (200, Tier(key=precision, value=precision)),
        (800, Tier(key=by_token(2, 64), value=by_token(2, 64))),
    )
    stored = sum(tier_bytes(tier, tokens, (128, 128), 2) for tokens, tier in tiers)
    assert 100 * stored / (1000 * 256 * 2) == percent


def test_published_cells() -> None:
    (kivi,) = RECIPES["kivi"].candidates
    assert (kivi.key.bits, kivi.key.axis, kivi.key.group, kivi.key.residual) == (
        2,
        "channel",
        32,
        32,
    )
    assert (kivi.value.bits, kivi.value.axis, kivi.value.group) == (2, "token", 32)
    (zipcache,) = RECIPES["zipcache"].candidates
    assert zipcache.low is not None
    assert (zipcache.keep, zipcache.key.bits, zipcache.low.key.bits) == (0.6, 4, 2)
    assert zipcache.value.separable
    assert zipcache.low.value.separable
    (mikv,) = RECIPES["mikv"].candidates
    assert mikv.low is not None
    assert (mikv.keep, mikv.low.key.bits, mikv.low.value.bits) == (0.2, 2, 2)
    assert {(t.key.bits, t.value.bits) for t in RECIPES["kvtuner"].formats} == {
        (k, v) for k in (8, 4, 2) for v in (8, 4, 2)
    }


def test_formats_drop_tokens_only_where_they_must() -> None:
    entries = solve(0.4, "int4").entries
    assert {e.action.keep for e in entries if isinstance(e.action, KVAction)} == {1.0}
    (keep,) = {e.action.keep for e in solve(0.1, "int4").entries if isinstance(e.action, KVAction)}
    assert 0.2 < keep < 0.4


def test_budgets_below_a_format_are_refused_with_its_floor() -> None:
    with pytest.raises(InfeasibleError, match=r"what kivi stores at least.* smallest feasible"):
        solve(0.1, "kivi")


def test_absolute_budgets_are_bytes_at_their_length() -> None:
    plan = solve_language(
        PROFILE,
        budget="64tok",
        recipe="joint",
        solver=None,
        length=LENGTH,
        decode_every=None,
        command="",
    )
    assert plan.budget.max_rows is None
    assert plan.budget.kept == 64 / LENGTH
    assert cache_bytes(plan, LENGTH, 2) <= 64 * 4 * 64 * 2


def test_a_profile_without_bits_is_refused() -> None:
    without = make_profile(bits=False)
    with pytest.raises(ProfileError, match="--recipe joint"):
        solve(0.3, "joint", without)
    assert solve(0.3, "planned", without).predicted is not None


def test_what_was_not_measured_is_not_predicted() -> None:
    bits = FewBits(PROFILE)
    odd = replace(CANDIDATES[0], key=Precision(format="int", bits=4, group=8))
    assert not bits.measured(odd)
    with pytest.raises(ProfileError, match="did not measure the precisions"):
        bits.kl(odd)
    assert bare(odd) == CANDIDATES[0]


def test_every_precision_of_the_table_is_measured() -> None:
    bits = FewBits(PROFILE)
    for name in BITS:
        budget = Budget(asked="1", kept=1.0, reached=1.0, length=LENGTH)
        assert all(bits.measured(action) for action in menu(PROFILE, RECIPES[name], budget)), name


def test_a_narrow_menu_makes_the_same_problem_for_all_heads() -> None:
    budget = Budget(asked="0.3", kept=0.3, reached=0.3, length=LENGTH)
    problem = knapsack_of_bits(PROFILE, RECIPES["joint"], budget)
    assert problem.rate.shape == problem.distortion.shape
    assert len(problem.rate) == 4
    assert (problem.rate == problem.rate[0]).all()
    assert V8 in PROFILE.values
