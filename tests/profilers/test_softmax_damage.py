"""Damage where the softmax has learned sinks or soft caps: against the two attention outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cacheplan.profilers.damage import eviction_damage, nested_sets
from cacheplan.profilers.merge_damage import folded_contexts, merge_damage
from cacheplan.scorers.scores import Seen
from cacheplan.types import KeyNorm, KVAction, Merge

K, G, C, T, D = 2, 2, 30, 9, 8
QUERY = torch.randn(1, K * G, C + T, D)
KEY, VALUE = torch.randn(1, K, C + T, D), torch.randn(1, K, C + T, D)
SEEN = Seen(QUERY[:, :, :C], KEY[:, :, :C], VALUE[:, :, :C], 0.5)
SINKS = torch.randn(K * G)


def output(h: int, kept: Tensor, sinks: Tensor | None, softcap: float | None) -> Tensor:
    """`[T, D]` of query head h on the continuation when only `kept` of the context is there."""
    tokens = torch.cat([kept, torch.arange(C, C + T)])
    logits = QUERY[0, h, C:] @ KEY[0, h // G, tokens].T * 0.5
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill(tokens > torch.arange(C, C + T)[:, None], -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[h].expand(T, 1)], 1)
    return logits.softmax(-1)[:, : len(tokens)] @ VALUE[0, h // G, tokens]


@pytest.mark.parametrize("sinks", [None, SINKS, SINKS + 4])
@pytest.mark.parametrize("softcap", [None, 1.0])
def test_damage_of_eviction(sinks: Tensor | None, softcap: float | None) -> None:
    counts = [3, 12, C]
    nested = nested_sets(KVAction(keep=1.0, scorer=KeyNorm()), SEEN, counts)
    found = eviction_damage(
        QUERY[:, :, C:], KEY, VALUE, [nested], scale=0.5, sinks=sinks, softcap=softcap, block=4
    )
    expected = torch.zeros(K, len(counts), dtype=torch.float64)
    for h in range(K * G):
        full = output(h, torch.arange(C), sinks, softcap)
        for g, count in enumerate(counts):
            own = output(h, nested.order[h // G, :count].sort().values, sinks, softcap)
            expected[h // G, g] += (own - full).double().square().sum() / T
    torch.testing.assert_close(found[:, 0], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("sinks", [None, SINKS])
@pytest.mark.parametrize("softcap", [None, 1.0])
def test_damage_of_merging_nothing_is_none(sinks: Tensor | None, softcap: float | None) -> None:
    action = KVAction(keep=1.0, scorer=KeyNorm(), losers="merge", merge=Merge())
    folded = folded_contexts(action, SEEN, [5, C])
    found = merge_damage(
        QUERY[:, :, C:], KEY, VALUE, folded, scale=0.5, sinks=sinks, softcap=softcap
    )
    assert (found[:, 0] > 1e-3).all()
    assert found[:, 1].max() < 1e-9


def test_strong_sinks_make_eviction_harmless() -> None:
    """Where nearly all weight is on the sinks, no token matters."""
    nested = nested_sets(KVAction(keep=1.0, scorer=KeyNorm()), SEEN, [3])
    weak, strong = (
        eviction_damage(QUERY[:, :, C:], KEY, VALUE, [nested], scale=0.5, sinks=sinks).sum()
        for sinks in (SINKS, SINKS + 20)
    )
    assert strong < 1e-6 * weak
    merging = KVAction(keep=1.0, scorer=KeyNorm(), losers="merge", merge=Merge())
    folded = folded_contexts(merging, SEEN, [3])
    weak, strong = (
        merge_damage(QUERY[:, :, C:], KEY, VALUE, folded, scale=0.5, sinks=sinks).sum()
        for sinks in (SINKS, SINKS + 20)
    )
    assert strong < 1e-6 * weak
