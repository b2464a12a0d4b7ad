"""Which tokens of a layer stay: scores and choice over rows that may differ in length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cacheplan.errors import UnsupportedError
from cacheplan.kernels.column_sums.dispatch import column_sums
from cacheplan.runtime.rows import RaggedRows
from cacheplan.scorers.merging import fold
from cacheplan.scorers.scores import Rotary, Seen, score
from cacheplan.scorers.selection import kept_tokens
from cacheplan.types import (
    AccumulatedAttention,
    KVAction,
    KVPlan,
    ProbeAttention,
    WindowAttention,
)

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


@dataclass(frozen=True, eq=False)
class Choice:
    """What stays of one row: ascending indices, by `action`, which scored its tokens `[n]`."""

    kept: Tensor
    scores: Tensor
    action: KVAction


@dataclass(frozen=True, eq=False)
class Newest:
    """The newest T tokens of a batch entry, the first of them at the position `start`.

    `query` `[1, H, T, D]`; `rotary` is for scorers that need it, `probed` what probes have found,
    `images` `[1, n]` (bool) tells image tokens, right behind the prompt.
    """

    query: Tensor
    scale: float = 1.0
    start: int = 0
    rotary: Rotary | None = None
    probed: Mapping[ProbeAttention, Tensor] = field(default_factory=dict)
    images: Tensor | None = None


def choose(
    rows: RaggedRows, b: int, newest: Newest, counts: list[int], groups: Groups
) -> dict[int, Choice]:
    """What stays in each of entry b's rows; head h keeps at most `counts[h]`.

    Raises UnsupportedError where heads choose together but no longer hold the same tokens.
    """
    choices: dict[int, Choice] = {}
    group = newest.query.shape[1] // rows.heads
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
            own = [rows.of_entry(b)[h] for h in some]
            if rows.state is not None and isinstance(action.scorer, AccumulatedAttention):
                scores = torch.stack([rows.state[rows.row(r)] for r in own])[None]
            else:
                queries = [h * group + g for h in some for g in range(group)]
                key, value = rows.together(own)
                seen = Seen(
                    newest.query[:, queries],
                    key[None],
                    value[None],
                    newest.scale,
                    newest.start,
                    newest.rotary,
                    {scorer: found[:, some] for scorer, found in newest.probed.items()},
                )
                scores = _scores(rows, own, seen, action)
            kept = kept_tokens(scores, wanted, action, newest.images)
            if action.share == "layer":
                scores = scores.mean(1, keepdim=True).expand_as(scores)
            for r, tokens, deserved in zip(own, kept, scores[0], strict=True):
                choices[r] = Choice(tokens, deserved, action)
    return choices


def cut(rows: RaggedRows, choices: Mapping[int, Choice]) -> None:
    """Leave what was chosen; rows without a choice stay whole, losers are merged or dropped."""
    everything = [torch.arange(n, device=rows.keys.device) for n in rows.lengths]
    kept = [choices[r].kept if r in choices else own for r, own in enumerate(everything)]
    merged = {
        r: fold(rows.merged(r), choice.scores, choice.kept, choice.action)
        for r, choice in choices.items()
        if choice.action.merge is not None and len(choice.kept) < rows.lengths[r]
    }
    rows.keep(kept)
    for r, row in merged.items():
        rows.write(r, row)


def probes_of(plan: KVPlan) -> tuple[ProbeAttention, ...]:
    """The scorers of a plan that need tokens read behind the prompt."""
    actions = [entry.action for entry in plan.entries if isinstance(entry.action, KVAction)]
    scorers = dict.fromkeys(action.scorer for action in actions)
    return tuple(scorer for scorer in scorers if isinstance(scorer, ProbeAttention))


def counts_merged(groups: Groups) -> bool:
    """Whether some head stores how many tokens each of its rows stands for."""
    return any(action.merge is not None and action.merge.count_bias for _, action in groups)


def accumulate(rows: RaggedRows, b: int, query: Tensor, scale: float) -> None:
    """Add the attention of the newest tokens to the scores of all tokens they see (H2O)."""
    assert rows.state is not None
    group = query.shape[1] // rows.heads
    for h, r in enumerate(rows.of_entry(b)):
        own = query[:, h * group : (h + 1) * group]
        key = rows.keys[rows.row(r)][None, None]
        if rows.bias is not None:
            own, key = _biased(own, key, rows.bias[None, None, rows.row(r)], scale)
        rows.state[rows.row(r)] += column_sums(own, key, scale=scale)[0, 0]


def _scores(rows: RaggedRows, own: list[int], seen: Seen, action: KVAction) -> Tensor:
    """`[1, len(own), n]` for rows `own` of one length n."""
    if rows.bias is not None and isinstance(action.scorer, WindowAttention | AccumulatedAttention):
        bias = torch.stack([rows.bias[rows.row(r)] for r in own])[None]
        query, key = _biased(seen.query, seen.key, bias, seen.scale)
        seen = replace(seen, query=query, key=key)
    return score(action.scorer, seen)


def _biased(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries `[1, H, T, D + 1]` and keys whose scaled products hold the bias `[1, K, n]` too."""
    one = query.new_ones(*query.shape[:-1], 1)
    return torch.cat([query, one], dim=-1), torch.cat(
        [key.float(), bias[..., None] / scale], dim=-1
    )
