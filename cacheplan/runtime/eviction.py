"""Which tokens of a layer stay: scores and choice over rows that may differ in length."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cacheplan.errors import UnsupportedError
from cacheplan.kernels.column_sums.naive import column_sums
from cacheplan.runtime.rows import RaggedRows
from cacheplan.scorers.scores import Seen, score
from cacheplan.scorers.selection import kept_tokens
from cacheplan.types import AccumulatedAttention, KVAction, KVPlan

Groups = list[tuple[list[int], KVAction]]


def heads_by_action(plan: KVPlan, layer: int) -> Groups:
    """The kv heads of one layer, grouped by what is done, so that each scorer runs once."""
    groups: dict[KVAction, list[int]] = {}
    for entry in plan.entries:
        action = entry.action
        if entry.site.layer != layer or not isinstance(action, KVAction):
            continue
        whole = entry.site.head is None
        heads = list(range(plan.model.kv_heads)) if whole else [entry.site.head or 0]
        groups.setdefault(replace(action, keep=1.0), []).extend(heads)
    return [(heads, action) for action, heads in groups.items()]


def accumulates(groups: Groups) -> bool:
    return any(isinstance(action.scorer, AccumulatedAttention) for _, action in groups)


def choose(
    rows: RaggedRows, b: int, query: Tensor, counts: list[int], groups: Groups, *, scale: float
) -> list[Tensor]:
    """The tokens that stay in each of entry b's rows, by kv head, ascending.

    `query` `[1, H, T, D]` are the newest T tokens of the entry; head h keeps at most `counts[h]`.
    Raises UnsupportedError where heads choose together but no longer hold the same tokens.
    """
    kept: list[Tensor] = [torch.empty(0)] * rows.heads
    for heads, action in groups:
        lengths = {rows.lengths[rows.of_entry(b)[h]] for h in heads}
        if len(lengths) > 1 and (action.share == "layer" or action.split == "adaptive"):
            raise UnsupportedError(
                f"The heads of a layer hold {min(lengths)} to {max(lengths)} tokens, but share "
                f'"{action.share}" with split "{action.split}" needs as many in each: '
                "prefill the prompt in one piece."
            )
        together = [heads] if len(lengths) == 1 else [[h] for h in heads]
        for some in together:
            length = rows.lengths[rows.of_entry(b)[some[0]]]
            wanted = [min(counts[h], length) for h in some]
            scores = _scores(rows, b, query, some, action, scale)
            for h, tokens in zip(some, kept_tokens(scores, wanted, action), strict=True):
                kept[h] = tokens
    return kept


def accumulate(rows: RaggedRows, b: int, query: Tensor, scale: float) -> None:
    """Add the attention of the newest tokens to the scores of all tokens they see (H2O)."""
    assert rows.state is not None
    group = query.shape[1] // rows.heads
    for h, r in enumerate(rows.of_entry(b)):
        own = query[:, h * group : (h + 1) * group]
        key = rows.keys[rows.row(r)][None, None]
        rows.state[rows.row(r)] += column_sums(own, key, scale=scale)[0, 0]


def _scores(
    rows: RaggedRows, b: int, query: Tensor, heads: list[int], action: KVAction, scale: float
) -> Tensor:
    """`[1, len(heads), n]` for rows of one length n."""
    own = [rows.of_entry(b)[h] for h in heads]
    if rows.state is not None and isinstance(action.scorer, AccumulatedAttention):
        return torch.stack([rows.state[rows.row(r)] for r in own])[None]
    group = query.shape[1] // rows.heads
    queries = [h * group + g for h in heads for g in range(group)]
    key, value = rows.together(own)
    return score(action.scorer, Seen(query[:, queries], key[None], value[None], scale))
