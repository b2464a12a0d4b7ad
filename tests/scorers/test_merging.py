"""Folding against loops written from the papers' words, and what it may never change."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cacheplan.scorers.merging import Row, fold
from cacheplan.scorers.selection import kept_tokens
from cacheplan.types import KeyNorm, KVAction, Merge

N, D = 23, 6
NEAREST = KVAction(keep=0.5, scorer=KeyNorm(), losers="merge", merge=Merge())
MERGES = [
    Merge(),
    Merge(count_bias=False),
    Merge(to="similar", similarity=0.3),
    Merge(to="similar", similarity=-1.0, sigma="weights"),
]


def row(n: int = N, seed: int = 0) -> tuple[Row, Tensor]:
    """A smooth course of keys, so that neighbours are similar, and scores."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(n, D, generator=generator).cumsum(0)
    value = torch.randn(n, D, generator=generator)
    count = torch.randint(1, 4, (n,), generator=generator).float()
    return Row(key, value, count), torch.rand(n, generator=generator)


def kept_by(scores: Tensor, count: int, action: KVAction) -> Tensor:
    return kept_tokens(scores[None, None], [count], action)[0]


def folded_by_loops(row: Row, scores: Tensor, kept: Tensor, action: KVAction) -> Row:
    merge, n = action.merge, len(row.key)
    assert merge is not None
    stays = kept.tolist()
    free = [k for k in stays if action.sinks <= k < n - min(action.recent, len(stays))]
    cosine = torch.nn.functional.cosine_similarity(row.key[1:], row.key[:-1], dim=-1)
    alone = set(stays) - set(free)
    members: dict[int, list[int]] = {k: [k] for k in stays}
    if merge.to == "nearest":
        for i in set(range(n)) - set(stays):
            if free:
                members[min(free, key=lambda k, i=i: (abs(k - i), k))].append(i)  # type: ignore[misc]
    else:
        runs = [[0]]
        for i in range(1, n):
            if cosine[i - 1] < merge.similarity or i in alone or i - 1 in alone:
                runs.append([])
            runs[-1].append(i)
        for run in runs:
            pivots = [k for k in run if k in free]
            if pivots:
                best = max(pivots, key=lambda k: (float(scores[k]), -k))
                members[best] += [i for i in run if i not in stays]
    keys, values, counts = [], [], []
    for k in stays:
        own = members[k]
        weight = row.count[own].double()
        if merge.to == "similar" and len(own) > 1:
            square = (row.key[own] - row.key[k]).double().square().sum(-1)
            g = (-square / (2 * square.mean())).exp()
            if merge.sigma == "weights":
                g = (-square / (2 * (g.sum() / (math.sqrt(2) * len(own))) ** 2)).exp()
            weight = weight * g
        share = (weight / weight.sum())[:, None]
        keys.append((share * row.key[own]).sum(0))
        values.append((share * row.value[own]).sum(0))
        counts.append(row.count[own].sum() if merge.count_bias else row.count[k])
    return Row(torch.stack(keys).float(), torch.stack(values).float(), torch.stack(counts))


@settings(max_examples=60, deadline=None)
@given(
    merge=st.sampled_from(MERGES),
    seed=st.integers(0, 1000),
    count=st.integers(1, N),
    sinks=st.integers(0, 3),
    recent=st.integers(0, 5),
)
def test_folding_is_that_of_the_loops(
    merge: Merge, seed: int, count: int, sinks: int, recent: int
) -> None:
    action = replace(NEAREST, merge=merge, sinks=sinks, recent=recent)
    whole, scores = row(seed=seed)
    kept = kept_by(scores, count, action)
    found = fold(whole, scores, kept, action)
    expected = folded_by_loops(whole, scores, kept, action)
    torch.testing.assert_close(found.key, expected.key, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.value, expected.value, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.count, expected.count)
    for place, k in enumerate(kept.tolist()):
        if k < sinks or k >= N - min(recent, count):
            assert torch.equal(found.key[place], whole.key[k]), "protected tokens stay as they are"


@pytest.mark.parametrize("merge", MERGES)
def test_nothing_to_fold_changes_nothing(merge: Merge) -> None:
    whole, scores = row()
    found = fold(whole, scores, torch.arange(N), replace(NEAREST, merge=merge))
    assert torch.equal(found.key, whole.key)
    assert torch.equal(found.value, whole.value)
    assert torch.equal(found.count, whole.count)


@pytest.mark.parametrize("count", [4, 9])
def test_equal_keys_keep_their_softmax_mass(count: int) -> None:
    """n equal keys of different values attend as before once log n is added to the logit."""
    action = replace(NEAREST, merge=Merge(to="similar", similarity=0.99))
    steps = torch.randn(4, D)
    runs = torch.tensor([3, 9, 5, 7])
    whole = Row(steps.repeat_interleave(runs, 0), torch.randn(24, D), torch.ones(24))
    scores = torch.zeros(24)
    scores[[1, 9, 14, 20]] = 1.0  # one of each run, and further ones of the first
    kept = kept_by(scores, count, action)
    query = torch.randn(5, D)
    before = (query @ whole.key.T).softmax(-1) @ whole.value
    found = fold(whole, scores, kept, action)
    after = (query @ found.key.T + found.count.log()).softmax(-1) @ found.value
    assert found.count.sum() == 24
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    uncounted = (query @ found.key.T).softmax(-1) @ found.value
    assert (uncounted - before).abs().max() > 1e-2
    whole = replace(whole, key=steps[:1].expand(24, D))  # all alike: the nearest will do
    found = fold(whole, scores, kept, NEAREST)
    after = (query @ found.key.T + found.count.log()).softmax(-1) @ found.value
    torch.testing.assert_close(after, whole.value.mean(0).expand(5, D), atol=1e-5, rtol=1e-5)


def test_pivots_are_chosen_by_rank() -> None:
    """Not by positions in the order of scores, which overlaps with the best at chance level."""
    scores = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5, 0.05])
    assert kept_by(scores, 6, NEAREST).tolist() == [1, 3, 5, 6, 7, 8]
