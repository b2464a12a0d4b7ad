"""Measured damage against evicting for real and comparing attention outputs."""

from __future__ import annotations

import pytest
import torch

from cacheplan.profilers.damage import eviction_damage, kept_counts, nested_sets
from cacheplan.profilers.mass import mass_curve
from cacheplan.recipes import CANDIDATES
from cacheplan.scorers.scores import Rotary, Seen, score
from cacheplan.scorers.selection import kept_tokens
from cacheplan.types import KVAction, ProbeAttention

K, G, C, T, D = 2, 2, 37, 11, 8
KEEPS = (0.05, 0.2, 0.5, 0.9, 1.0)
QUERY = torch.randn(1, K * G, C + T, D)
KEY, VALUE = torch.randn(1, K, C + T, D), torch.randn(1, K, C + T, D)


def attention_output(kept: list[torch.Tensor]) -> torch.Tensor:
    """Output `[H, T, D]` on the continuation when each kv head sees only `kept` of the context."""
    outputs = []
    for h in range(K * G):
        hidden = torch.ones(T, C + T, dtype=torch.bool).triu(C + 1)
        evicted = torch.ones(C, dtype=torch.bool)
        evicted[kept[h // G]] = False
        hidden[:, :C] |= evicted
        logits = QUERY[0, h, C:] @ KEY[0, h // G].T * 0.5
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(weights @ VALUE[0, h // G])
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "action", [c for c in CANDIDATES if c.losers == "evict"], ids=lambda c: c.scorer.name
)
def test_damage_is_that_of_real_eviction(action: KVAction) -> None:
    rotary = Rotary(torch.tensor([1.0, 0.1]))
    probed = (
        {action.scorer: torch.rand(1, K, C)} if isinstance(action.scorer, ProbeAttention) else {}
    )
    seen = Seen(QUERY[:, :, :C], KEY[:, :, :C], VALUE[:, :, :C], 0.5, rotary=rotary, probed=probed)
    counts = kept_counts(KEEPS, C)
    nested = nested_sets(action, seen, counts)
    found = eviction_damage(QUERY[:, :, C:], KEY, VALUE, [nested], scale=0.5, block=4)
    scores = score(action.scorer, seen)
    full = attention_output([torch.arange(C)] * K)
    for g, count in enumerate(counts):
        error = attention_output(kept_tokens(scores, [count] * K, action)) - full
        expected = error.double().square().sum(-1).view(K, G, T).sum(1).mean(-1)
        torch.testing.assert_close(found[:, 0, g], expected, atol=1e-5, rtol=1e-4)
    assert found[:, 0, -1].abs().max() < 1e-9, "keeping everything damages nothing"


def test_mass_curve_is_the_share_of_the_best_tokens() -> None:
    curve = mass_curve(QUERY[:, :, :C], KEY[:, :, :C], scale=0.5)
    assert curve.shape == (129,)
    assert curve[0] == 0
    assert curve[-1] == pytest.approx(1.0)
    steps = curve[1:] - curve[:-1]
    assert (steps >= -1e-12).all()
    assert (steps[1:] <= steps[:-1] + 1e-9).all(), "sorted mass is concave"
