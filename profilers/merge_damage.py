"""Damage of merging to one layer's attention output: one pass for every keep fraction.

Merged keys change with the fraction, so nothing carries over from one to the next as it does where
tokens are dropped (`profilers/damage.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacheplan.profilers.damage import capped
from cacheplan.scorers.merging import Row, fold
from cacheplan.scorers.scores import Seen, score
from cacheplan.scorers.selection import kept_tokens
from cacheplan.types import KVAction


@dataclass(frozen=True, eq=False)
class Folded:
    """What merging leaves of the context, per kv head and keep fraction: `[K][G]` rows."""

    rows: list[list[Row]]


def folded_contexts(action: KVAction, seen: Seen, counts: Sequence[int]) -> Folded:
    """The context of `seen` (a batch of one) merged by `action` down to each of the counts."""
    scores = score(action.scorer, seen)
    K = scores.shape[1]
    shared = scores.mean(1, keepdim=True).expand_as(scores) if action.share == "layer" else scores
    rows: list[list[Row]] = [[] for _ in range(K)]
    for count in counts:
        for h, kept in enumerate(kept_tokens(scores, [count] * K, action, seen.images)):
            ones = torch.ones(seen.key.shape[2], device=scores.device)
            whole = Row(seen.key[0, h], seen.value[0, h], ones)
            rows[h].append(fold(whole, shared[0, h], kept, action))
    return Folded(rows)


def merge_damage(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    folded: Folded,
    *,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    block: int = 64,
) -> Tensor:
    """Squared output error on the continuation's queries, `[K, G]` float64.

    `query` `[1, H, T, D]` are the continuation's, `key` `[1, K, C + T, D]` and `value` those of the
    whole text; `sinks`, `softcap` and the unit are those of `eviction_damage`.
    """
    K, T = key.shape[1], query.shape[2]
    C, fractions = key.shape[2] - T, len(folded.rows[0])
    group = query.shape[1] // K
    sums = torch.zeros(K, fractions, dtype=torch.float64, device=query.device)
    for h in range(K):
        late = key[0, h, C:].float(), value[0, h, C:].float()
        early = Row(key[0, h, :C], value[0, h, :C], torch.ones(C, device=key.device))
        rows = query[0, h * group : (h + 1) * group].float()
        for start in range(0, T, block):
            part = rows[:, start : start + block]
            own = None if sinks is None else sinks[h * group : (h + 1) * group]
            full = _attention(part, early, *late, start, scale, own, softcap)
            for g, merged in enumerate(folded.rows[h]):
                error = _attention(part, merged, *late, start, scale, own, softcap) - full
                sums[h, g] += error.double().square().sum()
    return sums / T


def _attention(
    query: Tensor,
    context: Row,
    key: Tensor,
    value: Tensor,
    start: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Output `[G, t, Dv]` of the continuation's queries from `start` on."""
    n, t = len(context.key), query.shape[1]
    keys = torch.cat([context.key.float(), key[: start + t]])
    values = torch.cat([context.value.float(), value[: start + t]])
    logits = capped(query @ keys.T * scale, softcap)
    logits[..., :n] += context.count.log()
    future = torch.ones(t, start + t, dtype=torch.bool, device=query.device).triu(start + 1)
    logits[..., n:].masked_fill_(future, float("-inf"))
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(-1, t, 1)
        return torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1] @ values
    return logits.softmax(-1) @ values
