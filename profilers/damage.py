"""Damage of eviction to one layer's attention output, for every keep fraction in one pass.

Keeping more only adds to what was kept.  So the softmax numerator and denominator over nested
sets are running sums, and all fractions of one candidate cost a single attention pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacheplan.scorers.scores import score
from cacheplan.scorers.selection import kept_tokens
from cacheplan.types import KVAction


def kept_counts(keeps: Sequence[float], context: int) -> list[int]:
    """Tokens kept of `context` for each fraction."""
    return [max(1, min(context, int(keep * context + 1e-9))) for keep in keeps]


@dataclass(frozen=True, eq=False)
class Nested:
    """Growing sets of tokens: the first `counts[h][g]` of `order[h]` are kept at fraction g."""

    order: Tensor  # [K, C] int64
    counts: list[list[int]]  # [K][G], ascending


def nested_sets(
    action: KVAction, query: Tensor, key: Tensor, counts: Sequence[int], *, scale: float
) -> Nested:
    """What `action` keeps of the context for each of the ascending `counts`.

    `query` `[1, H, C, D]` and `key` `[1, K, C, D]` are those of the context alone.  Tokens are
    ordered by the smallest count at which they are kept, so any rule with nested choices fits.
    """
    scores = score(action.scorer, query, key, scale)
    _, K, C = scores.shape
    missed = torch.zeros(K, C, dtype=torch.int64, device=key.device)
    sizes: list[list[int]] = [[] for _ in range(K)]
    for count in counts:
        kept = torch.zeros(K, C, dtype=torch.bool, device=key.device)
        for h, tokens in enumerate(kept_tokens(scores, [count] * K, action)):
            kept[h, tokens] = True
            sizes[h].append(len(tokens))
        missed += ~kept
    return Nested(missed.argsort(dim=-1, stable=True), sizes)


def eviction_damage(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    candidates: Sequence[Nested],
    *,
    scale: float,
    block: int = 64,
) -> Tensor:
    """Squared output error on the continuation's queries, `[K, A, G]` float64.

    `query` `[1, H, T, D]` are the continuation's, `key` `[1, K, C + T, D]` and `value` those of
    the whole text.  The error is summed over channels and the query heads of the group and
    averaged over queries; continuation tokens are never evicted.
    """
    K, C = candidates[0].order.shape
    H, T = query.shape[1], query.shape[2]
    fractions = len(candidates[0].counts[0])
    sums = torch.zeros(K, len(candidates), fractions, dtype=torch.float64, device=query.device)
    position = torch.arange(C + T, device=query.device)
    for h in range(K):
        keys, values = key[0, h].float(), value[0, h].float()
        group = query[0, h * (H // K) : (h + 1) * (H // K)].float()
        for start in range(0, T, block):
            rows = group[:, start : start + block]
            last = position[C + start : C + start + rows.shape[1], None]
            logits = (rows @ keys.T * scale).masked_fill_(position > last, float("-inf"))
            weights = (logits - logits.amax(-1, keepdim=True)).exp()  # [G, block, C + T]
            full = weights @ values / weights.sum(-1, keepdim=True)
            above, below = weights[..., C:] @ values[C:], weights[..., C:].sum(-1, keepdim=True)
            for a, nested in enumerate(candidates):
                errors = _errors(nested, h, weights, values, above, below, full)
                sums[h, a] += torch.stack(errors)
    return sums / T


def _errors(
    nested: Nested,
    h: int,
    weights: Tensor,
    values: Tensor,
    above: Tensor,
    below: Tensor,
    full: Tensor,
) -> list[Tensor]:
    """Summed squared error at each fraction; `above / below` is the output with nothing kept."""
    order = nested.order[h]
    weights, values = weights[..., order], values[order]
    errors, done = [], 0
    for count in nested.counts[h]:
        part = weights[..., done:count]
        above = above + part @ values[done:count]
        below = below + part.sum(-1, keepdim=True)
        done = count
        errors.append((above / below.clamp(min=1e-30) - full).double().square().sum())
    return errors
