"""Scorers against their papers' formulas written out, and the choice they lead to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cacheplan.recipes import CANDIDATES
from cacheplan.scorers.scores import score
from cacheplan.scorers.selection import adaptive_counts, kept_tokens, ranked
from cacheplan.types import (
    SCORERS,
    AccumulatedAttention,
    KeyDifference,
    KeyNorm,
    KVAction,
    Position,
    Random,
    WindowAttention,
)

B, K, G, S, D = 2, 2, 3, 40, 8
QUERY, KEY = torch.randn(B, K * G, S, D), torch.randn(B, K, S, D)
LOGITS = QUERY @ KEY.repeat_interleave(G, 1).transpose(-1, -2) * 0.4
WEIGHTS = LOGITS.masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def test_key_norm() -> None:
    expected = -(KEY**2).sum(-1).sqrt()
    torch.testing.assert_close(score(KeyNorm(), QUERY, KEY, 0.4), expected)


def test_key_difference_is_lowest_for_the_common_direction() -> None:
    key = torch.randn(1, 1, 20, D) * 0.1 + torch.ones(D)
    key[0, 0, 7] = -torch.ones(D)
    scores = score(KeyDifference(), QUERY, key, 0.4)
    assert scores.argmax() == 7
    assert scores[0, 0, 7] == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_window_attention(pooling: str) -> None:
    found = score(WindowAttention(window=6, pool=3, pooling=pooling), QUERY, KEY, 0.4)
    mean = WEIGHTS[:, :, -6:].mean(2).view(B, K, G, S).mean(2)
    padded = torch.nn.functional.pad(mean, (1, 1))
    near = torch.stack([padded[..., i : i + S] for i in range(3)])
    expected = near.mean(0) if pooling == "average" else near.amax(0)
    torch.testing.assert_close(found, expected)


def test_accumulated_attention() -> None:
    sums = WEIGHTS.sum(2).view(B, K, G, S).sum(2)
    torch.testing.assert_close(score(AccumulatedAttention(), QUERY, KEY, 0.4), sums)
    mean = score(AccumulatedAttention(mean=True), QUERY, KEY, 0.4)
    torch.testing.assert_close(mean, sums / (S - torch.arange(S)))


def test_random_is_seeded_and_differs_between_heads() -> None:
    first, again, other = (score(Random(seed=s), QUERY, KEY, 0.4) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[:, 0], first[:, 1])


@pytest.mark.parametrize("name", [n for n in SCORERS if n != "random"])
def test_permuting_heads_permutes_scores(name: str) -> None:
    scorer = SCORERS[name]()
    heads = [1, 0]
    queries = [h * G + g for h in heads for g in range(G)]
    found = score(scorer, QUERY[:, queries], KEY[:, heads], 0.4)
    torch.testing.assert_close(found, score(scorer, QUERY, KEY, 0.4)[:, heads])


def test_ranking_protects_recent_then_sinks_and_breaks_ties_by_age() -> None:
    order = ranked(torch.zeros(8), sinks=2, recent=3)
    assert order.tolist() == [7, 6, 5, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("action", CANDIDATES, ids=lambda c: c.scorer.name)
@pytest.mark.parametrize("count", [1, 5, 33, 40])
def test_protected_tokens_survive(action: KVAction, count: int) -> None:
    kept = kept_tokens(score(action.scorer, QUERY, KEY, 0.4), [count] * K, action)
    assert sum(map(len, kept)) == B * K * count
    for tokens in map(set, (k.tolist() for k in kept)):
        recent = min(action.recent, count)
        assert set(range(S - recent, S)) <= tokens
        assert set(range(min(action.sinks, count - recent))) <= tokens


def test_shared_choice_is_one_set_for_all_heads() -> None:
    action = KVAction(keep=0.5, scorer=KeyNorm(), share="layer")
    kept = kept_tokens(score(KeyNorm(), QUERY, KEY, 0.4), [9, 9], action)
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
