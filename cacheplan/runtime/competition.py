"""Divide a plan's tokens among all heads of all layers by score (KVzip, arXiv 2505.23416)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cacheplan.plans.rows import kept_rows, protected_tokens
from cacheplan.scorers.selection import compete, ranked
from cacheplan.types import KVPlan

if TYPE_CHECKING:
    from cacheplan.runtime.eviction import Choice
    from cacheplan.runtime.layer import PlanLayer


def best_of_all(plan: KVPlan, layers: Sequence[PlanLayer]) -> None:
    """Cut all layers back to the best scores of all, once probes have scored what they hold.

    Each text of a batch is divided alone and keeps as many tokens in all as the plan says; every
    head gets its protected tokens first (`plans/SPEC.md`).
    """
    scored = [layer.score_probed() for layer in layers]
    heads = plan.model.kv_heads
    parts: list[list[int]] = [[] for _ in layers]
    for b, length in enumerate(layers[0].prompt):
        total = int(kept_rows(plan, length).sum())
        sure = min(protected_tokens(plan), total // (heads * len(layers)))
        rows = [own[r] for own in scored for r in range(b * heads, (b + 1) * heads)]
        scores = torch.stack([row.scores.cpu() for row in rows])[None]
        first = torch.stack([_first(row, sure) for row in rows])[None]
        counts = compete(scores, first, total)[0].tolist()
        for m, own in enumerate(parts):
            own += counts[m * heads : (m + 1) * heads]
    for layer, own in zip(layers, parts, strict=True):
        layer.cut_back(own, last=True)


def _first(row: Choice, count: int) -> Tensor:
    """The `count` tokens that a row has for sure, `[count]` int64."""
    recent = min(row.action.recent, count)
    return ranked(row.scores, sinks=row.action.sinks, recent=recent)[:count].cpu()
