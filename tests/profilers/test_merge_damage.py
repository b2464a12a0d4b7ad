"""Measured damage of merging against attention over the merged rows."""

from __future__ import annotations

import pytest
import torch

from cacheplan.profilers.damage import eviction_damage, kept_counts, nested_sets
from cacheplan.profilers.merge_damage import folded_contexts, merge_damage
from cacheplan.scorers.scores import Seen
from cacheplan.types import AccumulatedAttention, KeyNorm, KVAction, Merge

K, G, C, T, D = 2, 2, 37, 11, 8
KEEPS = (0.05, 0.3, 0.7, 1.0)
QUERY = torch.randn(1, K * G, C + T, D)
KEY, VALUE = torch.randn(1, K, C + T, D), torch.randn(1, K, C + T, D)
SEEN = Seen(QUERY[:, :, :C], KEY[:, :, :C], VALUE[:, :, :C], 0.5)


@pytest.mark.parametrize("merge", [Merge(), Merge(count_bias=False), Merge(to="similar")])
@pytest.mark.parametrize("share", ["head", "layer"])
def test_damage_is_that_of_the_merged_rows(merge: Merge, share: str) -> None:
    action = KVAction(
        keep=1.0, scorer=AccumulatedAttention(), sinks=1, share=share, losers="merge", merge=merge
    )
    folded = folded_contexts(action, SEEN, kept_counts(KEEPS, C))
    found = merge_damage(QUERY[:, :, C:], KEY, VALUE, folded, scale=0.5, block=4)
    for h in range(K):
        for g in range(len(KEEPS)):
            row = folded.rows[h][g]
            error = 0.0
            for t in range(T):
                for q in QUERY[0, h * G : (h + 1) * G, C + t]:
                    whole = (KEY[0, h, : C + t + 1] @ q * 0.5).softmax(0) @ VALUE[0, h, : C + t + 1]
                    keys = torch.cat([row.key, KEY[0, h, C : C + t + 1]])
                    values = torch.cat([row.value, VALUE[0, h, C : C + t + 1]])
                    bias = torch.cat([row.count.log(), torch.zeros(t + 1)])
                    merged = (keys @ q * 0.5 + bias).softmax(0) @ values
                    error += float((merged - whole).square().sum())
            assert found[h, g].item() == pytest.approx(error / T, rel=1e-3, abs=1e-9)
    assert found[:, -1].abs().max() < 1e-9, "keeping everything damages nothing"


def test_runs_without_a_likeness_are_dropped() -> None:
    """Nothing is as similar as a cosine of one, so what is left is plain eviction."""
    counts = kept_counts(KEEPS, C)
    drop = KVAction(keep=1.0, scorer=KeyNorm(), recent=3)
    merge = KVAction(
        keep=1.0,
        scorer=KeyNorm(),
        recent=3,
        losers="merge",
        merge=Merge(to="similar", similarity=1.0),
    )
    nested = nested_sets(drop, SEEN, counts)
    expected = eviction_damage(QUERY[:, :, C:], KEY, VALUE, [nested], scale=0.5)[:, 0]
    folded = folded_contexts(merge, SEEN, counts)
    found = merge_damage(QUERY[:, :, C:], KEY, VALUE, folded, scale=0.5)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
