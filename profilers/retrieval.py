"""Which query heads look at the words of an answer just before the model must say it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacheplan.profilers.prompts import Prompt


@dataclass(frozen=True, eq=False)
class Needles:
    """`rows` `[R]`: positions of the queries that predict answer tokens.

    `hay` `[R, C]` (bool): where in the context the words of each row's answer stand.
    """

    rows: Tensor
    hay: Tensor


def find_needles(prompt: Prompt) -> Needles | None:
    """The answers of a prompt that occur word by word in its context; None if none does."""
    context = torch.tensor(prompt.context)
    rows: list[int] = []
    hay: list[Tensor] = []
    for start, end in prompt.answers:
        answer = torch.tensor(prompt.continuation[start:end])
        if len(answer) > len(context):
            continue
        found = (context.unfold(0, len(answer), 1) == answer).all(1).nonzero()[:, 0]
        if len(found) == 0:
            continue
        marked = torch.zeros(len(context), dtype=torch.bool)
        marked[(found[:, None] + torch.arange(len(answer))).flatten()] = True
        rows += range(len(context) + start - 1, len(context) + end - 1)
        hay += [marked] * len(answer)
    return Needles(torch.tensor(rows), torch.stack(hay)) if rows else None


def retrieval_score(
    query: Tensor, key: Tensor, needles: Needles, *, scale: float
) -> NDArray[np.float64]:
    """Attention mass on the answer's words, mean over the tokens that must be said, `[H]`.

    `query` `[1, H, S, D]` and `key` `[1, K, S, D]` of the whole text.  The score of semantic
    retrieval heads in CompressKV (arXiv 2508.02401), with the true answer instead of
    the tokens that the model generates.
    """
    H, S = query.shape[1], query.shape[2]
    rows, hay = needles.rows.to(key.device), needles.hay.to(key.device)
    keys = key[0].float().repeat_interleave(H // key.shape[1], 0)  # [H, S, D]
    logits = query[0, :, rows].float() @ keys.transpose(-1, -2) * scale  # [H, R, S]
    unseen = torch.arange(S, device=key.device) > rows[:, None]
    weights = logits.masked_fill_(unseen, float("-inf")).softmax(-1)[..., : hay.shape[1]]
    found: NDArray[np.float64] = (weights * hay).sum(-1).double().mean(-1).cpu().numpy()
    return found
