"""Damage of few bits against packing for real and comparing attention outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cacheplan.adapters.attention import Step
from cacheplan.plans.storage import divide
from cacheplan.profilers.damage import kept_counts, nested_sets
from cacheplan.profilers.quantization import (
    BitMenu,
    asked_queries,
    bit_statistics,
    coarsened,
    demoted_damage,
    stored,
)
from cacheplan.recipes.bits import FP8, K2_FINE, K4, K4_SHORT, K8, MODEL, V2, V4
from cacheplan.scorers.scores import Seen
from cacheplan.types import KeyNorm, KVAction, Precision, Tier, WindowAttention

K, G, C, T, D = 2, 2, 71, 12, 8
KEEPS = (0.1, 0.5, 1.0)
QUERY = torch.randn(1, K * G, C + T, D)
KEY, VALUE = torch.randn(1, K, C + T, D), torch.randn(1, K, C + T, D)
CANDIDATES = (
    KVAction(keep=1.0, scorer=KeyNorm(), sinks=2),
    KVAction(keep=1.0, scorer=WindowAttention(window=8), recent=4),
)
LOW = Tier(key=K2_FINE, value=V2)
CHECKED = (
    replace(CANDIDATES[0], keep=0.5, key=K2_FINE, value=V4),
    replace(CANDIDATES[1], keep=0.1, key=FP8, value=FP8, losers="demote", low=LOW),
)
MENU = BitMenu(keys=(K4, K8, K2_FINE), values=(V4, FP8, V2), demoted=(1, 0), joint=CHECKED)
SINKS, SOFTCAP = torch.randn(K * G), 3.0


def step_of(sinks: Tensor | None = None, softcap: float | None = None) -> Step:
    return Step(torch.nn.Identity(), QUERY, 0.5, sinks=sinks, softcap=softcap)


def output(h: int, keys: Tensor, values: Tensor, step: Step) -> Tensor:
    """Output `[G, T, D]` of the continuation with these keys and values of the context."""
    rows = QUERY[0, h * G : (h + 1) * G, C:]
    logits = rows @ torch.cat([keys, KEY[0, h, C:]]).T * step.scale
    if step.softcap is not None:
        logits = step.softcap * torch.tanh(logits / step.softcap)
    hidden = torch.ones(T, len(keys) + T, dtype=torch.bool).triu(len(keys) + 1)
    logits = logits.masked_fill(hidden, -torch.inf)
    if step.sinks is not None:
        aside = step.sinks[h * G : (h + 1) * G, None, None].expand(-1, T, 1)
        logits = torch.cat([logits, aside], -1)
    weights = logits.softmax(-1)[..., : len(keys) + T]
    return weights @ torch.cat([values, VALUE[0, h, C:]])


def error(found: Tensor, full: Tensor) -> float:
    return float((found - full).double().square().sum((0, 2))[asked_queries(T)].mean())


@pytest.mark.parametrize("step", [step_of(), step_of(SINKS), step_of(softcap=SOFTCAP)])
def test_damage_is_that_of_packing(step: Step) -> None:
    seen = Seen(QUERY[:, :, :C], KEY[:, :, :C], VALUE[:, :, :C], 0.5)
    sets = [nested_sets(action, seen, kept_counts(KEEPS, C)) for action in CANDIDATES]
    found = bit_statistics(step, C, KEY, VALUE, CANDIDATES, sets, MENU)
    for h in range(K):
        keys, values = KEY[0, h, :C], VALUE[0, h, :C]
        full = output(h, keys, values, step)
        for f in range(3):
            by_key = error(output(h, stored(keys, MENU.keys[f]), values, step), full)
            by_value = error(output(h, keys, stored(values, MENU.values[f]), step), full)
            assert float(found["key_damage"][h, f]) == pytest.approx(by_key, rel=1e-3)
            assert float(found["value_damage"][h, f]) == pytest.approx(by_value, rel=1e-3)
        for j, action in enumerate(CHECKED):
            own = sets[j].order[h, : kept_counts([action.keep], C)[0]].sort().values
            other = torch.tensor([i for i in range(C) if i not in own.tolist()])
            tokens = divide(action, len(own), len(other))
            parts = [(own[: tokens.high], Tier(key=action.key, value=action.value))]
            exact = own[tokens.high :]
            if action.low is not None:
                parts.append((other[: tokens.low], action.low))
                exact = torch.cat([exact, other[tokens.low :]])
            parts.append((exact, Tier(key=MODEL, value=MODEL)))
            kept_keys = torch.cat([stored(keys[n], tier.key) for n, tier in parts])
            kept_values = torch.cat([stored(values[n], tier.value) for n, tier in parts])
            expected = error(output(h, kept_keys, kept_values, step), full)
            assert float(found["joint_damage"][h, j]) == pytest.approx(expected, rel=1e-3)


def test_demoted_damage_is_that_of_losers_in_few_bits() -> None:
    seen = Seen(QUERY[:, :, :C], KEY[:, :, :C], VALUE[:, :, :C], 0.5)
    sets = [nested_sets(action, seen, kept_counts(KEEPS, C)) for action in CANDIDATES]
    found = demoted_damage(step_of(), C, KEY, VALUE, sets, MENU)
    assert found.shape == (K, 2, 3, 2)
    for h in range(K):
        keys, values = KEY[0, h, :C], VALUE[0, h, :C]
        full = output(h, keys, values, step_of())
        for a, own in enumerate(sets):
            for g, count in enumerate(own.counts[h]):
                losers = own.order[h, count:]
                few_keys, few_values = keys.clone(), values.clone()
                few_keys[losers] = stored(keys, MENU.keys[-1])[losers]
                few_values[losers] = stored(values, MENU.values[-1])[losers]
                by_key = error(output(h, few_keys, values, step_of()), full)
                by_value = error(output(h, keys, few_values, step_of()), full)
                assert float(found[h, a, g, 0]) == pytest.approx(by_key, rel=1e-3, abs=1e-9)
                assert float(found[h, a, g, 1]) == pytest.approx(by_value, rel=1e-3, abs=1e-9)


def test_one_head_at_a_time_is_coarse() -> None:
    keys, values = (torch.cat(x) for x in coarsened(KEY, VALUE, MENU, at_once=3))
    assert keys.shape == values.shape == (2 * K, K, C + T, D)
    for entry in range(2 * K):
        head, by_value = divmod(entry, 2)
        for h in range(K):
            assert torch.equal(keys[entry, h], KEY[0, h]) == (by_value == 1 or h != head)
            assert torch.equal(values[entry, h], VALUE[0, h]) == (by_value == 0 or h != head)


@pytest.mark.parametrize("precision", [MODEL, FP8, K4, K4_SHORT, K2_FINE])
def test_tokens_outside_of_groups_stay_as_they_are(precision: Precision) -> None:
    found = stored(KEY[0, :, :C], precision)
    group = (precision.group or 1) if precision.axis == "channel" else 1
    whole = 0 if precision == MODEL else C - C % group
    assert torch.equal(found[:, whole:], KEY[0, :, whole:C])
    assert whole == 0 or not torch.equal(found[:, :whole], KEY[0, :, :whole])


def test_half_of_the_queries_are_asked_without_a_rhythm() -> None:
    asked = asked_queries(1000)
    assert asked[0] == 0
    assert abs(len(asked) - 500) <= 1
    for period in (2, 3, 4, 5, 8):
        phases = [sum(i % period == phase for i in asked) for phase in range(period)]
        assert max(phases) - min(phases) <= 0.1 * 500
