"""Fold tokens that do not stay into tokens that do: one definition for profiler and runtime."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cacheplan.scorers.selection import recent_tokens
from cacheplan.types import KVAction, Merge


@dataclass(frozen=True, eq=False)
class Row:
    """n tokens of one head: `key` `[n, D]`, `value` `[n, Dv]`; `count` `[n]` float32 tokens each.

    `count` is above 1 where earlier merges have folded tokens together.
    """

    key: Tensor
    value: Tensor
    count: Tensor


def fold(row: Row, scores: Tensor, kept: Tensor, action: KVAction) -> Row:
    """The row of the `kept` tokens (ascending indices `[m]`), losers folded in (see `Merge`).

    `scores` `[n]` decide between several kept tokens of one run.  A kept token that takes nothing
    in keeps its bits.
    """
    merge = action.merge
    assert merge is not None
    n, m = len(row.key), len(kept)
    protected = _protected(n, kept, action)
    if merge.to == "nearest":
        place = _nearest(n, kept, protected)
    else:
        place = _same_run(row.key, scores, kept, protected, merge.similarity)
    place[kept] = torch.arange(m, device=kept.device)
    source = (place >= 0).nonzero()[:, 0]
    place = place[source]
    weight = row.count[source]
    if merge.to == "similar":
        weight = weight * _gaussian(row.key[source], row.key[kept][place], place, m, merge)
    taking = torch.bincount(place, minlength=m) > 1
    total = _sum(weight, place, m)

    def mean(tensor: Tensor) -> Tensor:
        sums = _sum(tensor[source].float() * weight[:, None], place, m)
        return torch.where(taking[:, None], (sums / total[:, None]).to(tensor.dtype), tensor[kept])

    # without a bias every token goes on counting as one
    count = _sum(row.count[source], place, m) if merge.count_bias else row.count[kept]
    return Row(mean(row.key), mean(row.value), count)


def _protected(n: int, kept: Tensor, action: KVAction) -> Tensor:
    """Which of the kept tokens stay as they are, bool `[m]`."""
    return (kept < action.sinks) | (kept >= n - recent_tokens(action, len(kept)))


def _nearest(n: int, kept: Tensor, protected: Tensor) -> Tensor:
    """The place among the kept of the one nearest to each token, `[n]`; -1 where there is none."""
    free = (~protected).nonzero()[:, 0]
    if len(free) == 0:
        return kept.new_full((n,), -1)
    anchors = kept[free]
    index = torch.arange(n, device=kept.device)
    after = torch.searchsorted(anchors, index).clamp(max=len(anchors) - 1)
    before = (after - 1).clamp(min=0)
    older = (index - anchors[before]).abs() <= (anchors[after] - index).abs()
    return free[torch.where(older, before, after)]


def _same_run(
    key: Tensor, scores: Tensor, kept: Tensor, protected: Tensor, similarity: float
) -> Tensor:
    """The place among the kept of the best of each token's run, `[n]`; -1 where nothing stays."""
    n, m = len(key), len(kept)
    alone = torch.zeros(n, dtype=torch.bool, device=key.device)
    alone[kept[protected]] = True
    near = cosine_similarity(key[1:].float(), key[:-1].float(), dim=-1) >= similarity
    joined = near & ~alone[1:] & ~alone[:-1]
    run = torch.cat([joined.new_zeros(1), ~joined]).cumsum(0)  # [n]
    order = scores[kept].argsort(descending=True, stable=True)
    order = order[~protected[order]]
    best = torch.full((n,), m, device=key.device)  # rank of the best token of each run
    ranks = torch.arange(len(order), device=key.device)
    best.scatter_reduce_(0, run[kept[order]], ranks, "amin")
    rank = best[run]
    pivots = torch.cat([order, order.new_full((1,), -1)])
    return pivots[rank.clamp(max=len(order))]


def _gaussian(key: Tensor, pivot: Tensor, place: Tensor, m: int, merge: Merge) -> Tensor:
    """exp(-|k - k_p|^2 / 2 sigma^2) with one sigma per pivot, `[n]`."""
    distance = (key.float() - pivot.float()).square().sum(-1)
    size = torch.bincount(place, minlength=m)
    tiny = torch.finfo(torch.float32).tiny
    square = _sum(distance, place, m) / size
    weights: Tensor = (-distance / (2 * square[place]).clamp(min=tiny)).exp()
    if merge.sigma == "weights":
        sigma = _sum(weights, place, m) / (2**0.5 * size)
        weights = (-distance / (2 * sigma[place].square())).exp()
    return weights


def _sum(x: Tensor, place: Tensor, m: int) -> Tensor:
    return x.new_zeros(m, *x.shape[1:]).index_add_(0, place, x)
