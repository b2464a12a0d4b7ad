"""Scorers against their papers' formulas written out, and the choice they lead to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cacheplan.recipes import CANDIDATES
from cacheplan.scorers.scores import Rotary, Seen, score
from cacheplan.scorers.selection import adaptive_counts, kept_tokens, ranked
from cacheplan.types import (
    SCORERS,
    AccumulatedAttention,
    KeyDifference,
    KeyNorm,
    KVAction,
    Position,
    ProbeAttention,
    Random,
    WindowAttention,
)

B, K, G, S, D = 2, 2, 3, 40, 8
QUERY, KEY, VALUE = torch.randn(B, K * G, S, D), torch.randn(B, K, S, D), torch.randn(B, K, S, D)
PROBES = [c.scorer for c in CANDIDATES if isinstance(c.scorer, ProbeAttention)]
SEEN = Seen(
    QUERY,
    KEY,
    VALUE,
    0.4,
    rotary=Rotary(torch.tensor([1.0, 0.1, 0.01, 0.001])),
    probed={scorer: torch.rand(B, K, S) for scorer in PROBES},
)
LOGITS = QUERY @ KEY.repeat_interleave(G, 1).transpose(-1, -2) * 0.4
WEIGHTS = LOGITS.masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def test_key_norm() -> None:
    expected = -(KEY**2).sum(-1).sqrt()
    torch.testing.assert_close(score(KeyNorm(), SEEN), expected)


def test_key_difference_is_lowest_for_the_common_direction() -> None:
    key = torch.randn(1, 1, 20, D) * 0.1 + torch.ones(D)
    key[0, 0, 7] = -torch.ones(D)
    scores = score(KeyDifference(), Seen(QUERY, key, key, 0.4))
    assert scores.argmax() == 7
    assert scores[0, 0, 7] == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_window_attention(pooling: str) -> None:
    found = score(WindowAttention(window=6, pool=3, pooling=pooling), SEEN)
    mean = WEIGHTS[:, :, -6:].mean(2).view(B, K, G, S).mean(2)
    padded = torch.nn.functional.pad(mean, (1, 1))
    near = torch.stack([padded[..., i : i + S] for i in range(3)])
    expected = near.mean(0) if pooling == "average" else near.amax(0)
    torch.testing.assert_close(found, expected)


def test_accumulated_attention() -> None:
    sums = WEIGHTS.sum(2).view(B, K, G, S).sum(2)
    torch.testing.assert_close(score(AccumulatedAttention(), SEEN), sums)
    mean = score(AccumulatedAttention(mean=True), SEEN)
    torch.testing.assert_close(mean, sums / (S - torch.arange(S)))


def test_random_is_seeded_and_differs_between_heads() -> None:
    first, again, other = (score(Random(seed=s), SEEN) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[:, 0], first[:, 1])


@pytest.mark.parametrize("name", [n for n in SCORERS if n != "random"])
def test_permuting_heads_permutes_scores(name: str) -> None:
    scorer = SCORERS[name]()
    heads = [1, 0]
    found = score(scorer, SEEN.heads(heads))
    torch.testing.assert_close(found, score(scorer, SEEN)[:, heads])


def test_ranking_protects_recent_then_sinks_and_breaks_ties_by_age() -> None:
    order = ranked(torch.zeros(8), sinks=2, recent=3)
    assert order.tolist() == [7, 6, 5, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("action", CANDIDATES, ids=lambda c: c.scorer.name)
@pytest.mark.parametrize("count", [1, 5, 33, 40])
def test_protected_tokens_survive(action: KVAction, count: int) -> None:
    kept = kept_tokens(score(action.scorer, SEEN), [count] * K, action)
    assert sum(map(len, kept)) == B * K * count
    for tokens in map(set, (k.tolist() for k in kept)):
        recent = min(action.recent, count)
        assert set(range(S - recent, S)) <= tokens
        assert set(range(min(action.sinks, count - recent))) <= tokens


def test_shared_choice_is_one_set_for_all_heads() -> None:
    action = KVAction(keep=0.5, scorer=KeyNorm(), share="layer")
    kept = kept_tokens(score(KeyNorm(), SEEN), [9, 9], action)
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[2], kept[3])


def test_adaptive_split_is_the_best_of_the_layer() -> None:
    """Golden vector: heads [9,8,7,6,1,1] and [5,2,2,1,1,1], three slots each -> 4 and 2."""
    scores = torch.tensor([[[9.0, 8, 7, 6, 1, 1], [5.0, 2, 2, 1, 1, 1]]])
    free = KVAction(keep=0.5, scorer=Position(), split="adaptive")
    assert adaptive_counts(scores, 3, free).tolist() == [[4, 2]]
    kept = kept_tokens(scores, [3, 3], free)
    dropped = scores.sum() - sum(scores[0, h, t].sum() for h, t in enumerate(kept))
    assert dropped == 7
    floored = replace(free, floor=1.0)
    assert adaptive_counts(scores, 3, floored).tolist() == [[3, 3]]
    assert adaptive_counts(scores, 3, replace(free, floor=0.2)).sum() == 6
