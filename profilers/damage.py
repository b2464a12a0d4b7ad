"""Damage of eviction to one layer's attention output, for every keep fraction in one pass.

Keeping more only adds to what was kept.  So the softmax numerator and denominator over nested
sets are running sums, and all fractions of one candidate cost a single attention pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from cacheplan.scorers.scores import Seen, score
from cacheplan.scorers.selection import kept_tokens, ranked, recent_tokens, text_first
from cacheplan.types import KVAction


def kept_counts(keeps: Sequence[float], context: int) -> list[int]:
    """Tokens kept of `context` for each fraction."""
    return [max(1, min(context, int(keep * context + 1e-9))) for keep in keeps]


@dataclass(frozen=True, eq=False)
class Nested:
    """Growing sets of tokens: the first `counts[h][g]` of `order[h]` are kept at fraction g."""

    order: Tensor  # [K, C] int64
    counts: list[list[int]]  # [K][G], ascending


def nested_sets(action: KVAction, seen: Seen, counts: Sequence[int]) -> Nested:
    """What `action` keeps of the context for each of the ascending `counts`.

    `seen` (a batch of one) is the context alone.  Tokens are ordered by the smallest count at
    which they are kept, so any rule with nested choices fits.
    """
    scores = score(action.scorer, seen)
    if action.protect_text and seen.images is not None:
        scores = text_first(scores, seen.images)
    _, K, C = scores.shape
    if action.split != "adaptive":
        missed = _missed(scores[0], counts, action)
        return Nested(missed.argsort(dim=-1, stable=True), [[*counts]] * K)
    missed = torch.zeros(K, C, dtype=torch.int64, device=scores.device)
    sizes: list[list[int]] = [[] for _ in range(K)]
    for count in counts:
        kept = torch.zeros(K, C, dtype=torch.bool, device=scores.device)
        for h, tokens in enumerate(kept_tokens(scores, [count] * K, action)):
            kept[h, tokens] = True
            sizes[h].append(len(tokens))
        missed += ~kept
    return Nested(missed.argsort(dim=-1, stable=True), sizes)


def _missed(scores: Tensor, counts: Sequence[int], action: KVAction) -> Tensor:
    """How many of the sets that `kept_tokens` keeps at `counts` miss each token, `[K, C]` int64.

    One ranking serves all counts: what differs is how many of the newest tokens are reserved, and
    the others stay in their order.
    """
    C = scores.shape[-1]
    if action.share == "layer":
        scores = scores.mean(0, keepdim=True).expand_as(scores)
    order = ranked(scores, sinks=action.sinks, recent=0)
    missed = torch.zeros_like(order)
    for count in counts:
        recent = recent_tokens(action, count)
        others = order < C - recent
        missed += others & (others.cumsum(-1) > count - recent)
    return torch.empty_like(missed).scatter_(-1, order, missed)


def eviction_damage(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    candidates: Sequence[Nested],
    *,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    block: int = 128,
) -> Tensor:
    """Squared output error on the continuation's queries, `[K, A, G]` float64.

    `query` `[1, H, T, D]` are the continuation's, `key` `[1, K, C + T, D]` and `value` those of
    the whole text.  The error is summed over channels and the query heads of the group and
    averaged over queries; continuation tokens are never evicted.  `sinks` `[H]` and `softcap` are
    those of `kernels.ragged_attention`.
    """
    K, C = candidates[0].order.shape
    H, T = query.shape[1], query.shape[2]
    fractions = len(candidates[0].counts[0])
    sums = torch.zeros(K, len(candidates), fractions, dtype=torch.float64, device=query.device)
    position = torch.arange(C + T, device=query.device)
    for h in range(K):
        keys, values = key[0, h].float(), pad(value[0, h].float(), (0, 1), value=1.0)
        group = query[0, h * (H // K) : (h + 1) * (H // K)].float()
        for start in range(0, T, block):
            rows = group[:, start : start + block]
            last = position[C + start : C + start + rows.shape[1], None]
            logits = capped(rows @ keys.T * scale, softcap)
            logits.masked_fill_(position > last, float("-inf"))
            most, aside = logits.amax(-1, keepdim=True), torch.zeros(())
            if sinks is not None:  # a weight that every softmax has beside its tokens
                own = sinks.float().view(K, -1, 1, 1)[h]
                most = torch.maximum(most, own)
                aside = (own - most).exp()
            weights = (logits - most).exp()  # [G, block, C + T]
            base = weights[..., C:] @ values[C:]
            base[..., -1:] += aside
            whole = weights[..., :C] @ values[:C] + base
            full = whole[..., :-1] / whole[..., -1:]
            for a, nested in enumerate(candidates):
                sums[h, a] += _errors(nested, h, weights, values, base, full)
    return sums / T


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits bounded softly (Gemma 2, arXiv 2408.00118), or as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _errors(
    nested: Nested,
    h: int,
    weights: Tensor,
    values: Tensor,
    base: Tensor,
    full: Tensor,
) -> Tensor:
    """Summed squared error at each fraction, `[G]`; `base` is the sum with nothing kept.

    The last channel of `values` is 1, so that one product sums numerator and denominator.
    """
    order, ends = nested.order[h], nested.counts[h]
    weights, values = weights.flatten(0, 1).index_select(1, order), values[order]  # [rows, C]
    parts = zip([0, *ends], ends, strict=False)
    added = torch.stack([weights[:, start:end] @ values[start:end] for start, end in parts])
    outcome = base.flatten(0, 1) + added.cumsum(0)
    output = outcome[..., :-1] / outcome[..., -1:].clamp(min=1e-30)
    return (output - full.flatten(0, 1)).double().square().sum((1, 2))
