"""From scores to the tokens that stay: protection, ranking, and division among heads."""

from __future__ import annotations

import torch
from torch import Tensor

from cacheplan.types import KVAction


def recent_tokens(action: KVAction, count: int) -> int:
    """How many of `count` kept tokens are reserved for the newest ones."""
    return min(count, max(action.recent, int(action.recent_share * count)))


def ranked(scores: Tensor, *, sinks: int, recent: int) -> Tensor:
    """Order tokens from the first to keep to the first to drop, `[..., S]` int64.

    The newest `recent` come first (newest leading), then the first `sinks`, then the rest by
    score; equal scores keep the older token, so smaller choices are subsets of larger ones.
    """
    S = scores.shape[-1]
    recent = min(recent, S)
    index = torch.arange(S, device=scores.device)
    first = torch.cat([index[S - recent :].flip(0), index[: min(sinks, S - recent)]])
    raised = scores.index_fill(-1, first, float("inf"))
    order = raised.argsort(dim=-1, descending=True, stable=True)
    order[..., : len(first)] = first
    return order


def adaptive_counts(scores: Tensor, count: int, action: KVAction) -> Tensor:
    """Divide `K * count` tokens of a layer among its heads, `[B, K]` int64.

    Every head gets its protected tokens and the share `floor` of the rest of an equal division;
    what remains goes to the best scores of the whole layer (AdaKV, arXiv 2407.11550, eq. 5;
    floor-then-fill conserves the sum, which the authors' floor and round does not).
    """
    K = scores.shape[1]
    recent = recent_tokens(action, count)
    sinks = min(action.sinks, count - recent)
    protected = recent + sinks
    sure = protected + int(action.floor * (count - protected))
    first = ranked(scores, sinks=sinks, recent=recent)[..., :sure]
    return compete(scores, first, K * count)


def compete(scores: Tensor, first: Tensor, total: int) -> Tensor:
    """Divide `total` tokens among rows by their scores `[B, R, S]`, `[B, R]` int64.

    Every row has the tokens `first` `[B, R, F]` for sure; the best of the others win, ties going
    to the earlier row and token.
    """
    B, R, S = scores.shape
    rest = scores.scatter(-1, first, float("-inf")).reshape(B, R * S)
    best = rest.argsort(dim=-1, descending=True, stable=True)[:, : total - first.numel() // B]
    counts = torch.full((B, R), first.shape[-1], device=scores.device)
    return counts.scatter_add_(1, best // S, torch.ones_like(best))


def text_first(scores: Tensor, images: Tensor) -> Tensor:
    """Scores `[B, K, S]` in which all text stands above the `images` `[B, S]` (bool).

    Both keep their order (LOOK-M's text prior, arXiv 2406.18139, section 3.2).  float64, so that
    small scores survive the shift.
    """
    numbers = scores.double()
    known = numbers.masked_fill(~numbers.isfinite(), 0.0)
    low, high = known.amin() - 1, known.amax() + 1
    numbers = numbers.clamp(low, high)  # infinite scores must come within reach
    return numbers - images[:, None] * (high - low + 1)


def kept_tokens(
    scores: Tensor, counts: list[int], action: KVAction, images: Tensor | None = None
) -> list[Tensor]:
    """Choose the tokens of every row: ascending indices, row `b * K + h` at that place.

    `scores` `[B, K, S]`; `counts` `[K]` tokens per kv head; `images` `[B, S]` (bool) are image
    tokens, of which a text has none.
    """
    B, K, _ = scores.shape
    rows = [counts] * B
    if action.protect_text and images is not None:
        scores = text_first(scores, images)
    if action.share == "layer":
        scores = scores.mean(1, keepdim=True).expand_as(scores)
    if action.split == "adaptive":
        rows = adaptive_counts(scores, counts[0], action).tolist()
    orders: dict[int, Tensor] = {}  # by protected recent tokens: they may depend on the count
    kept = []
    for b in range(B):
        for h in range(K):
            count = rows[b][h]
            # an adaptive head protects the window of the equal division
            recent = recent_tokens(action, counts[h] if action.split == "adaptive" else count)
            if recent not in orders:
                orders[recent] = ranked(scores, sinks=action.sinks, recent=recent)
            kept.append(orders[recent][b, h, :count].sort().values)
    return kept
