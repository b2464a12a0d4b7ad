"""What evicting one head costs while all other heads follow a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from cacheplan.adapters.attention import (
    AttendingCache,
    AttendingLayer,
    Step,
    attending,
    causal_attention,
)
from cacheplan.adapters.images import read
from cacheplan.adapters.language import readers
from cacheplan.adapters.offloading import input_device
from cacheplan.adapters.probe import continues_at_once
from cacheplan.adapters.rotary import rotary_frequencies
from cacheplan.plans.rows import kept_rows
from cacheplan.profilers.divergence import kl_divergence
from cacheplan.profilers.observer import Ablation, LayerRecord
from cacheplan.profilers.prompts import Prompt
from cacheplan.profilers.replay import replay
from cacheplan.scorers.scores import Rotary, Seen, score
from cacheplan.scorers.selection import kept_tokens
from cacheplan.types import KVAction, KVPlan, needs_rotary

_REPLAYED = 8  # heads that go through the model in one batch
Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class InContext:
    """Divergence of the model under a plan, mean over prompts, in nats per token.

    `kl` is that of the plan, `restored` `[L, K]` that of the plan with one head kept whole.
    """

    kl: float
    restored: Floats | None


def measure_in_context(
    model: Any,
    plan: KVPlan,
    prompts: Sequence[Prompt],
    *,
    restore: bool = True,
    progress: Progress | None = None,
) -> InContext:
    """Run the continuations under a plan, and (`restore`) with each head in turn kept whole.

    The plan's entries are one for each head.
    """
    kls, restored = [], []
    with attending(model), torch.no_grad():
        for number, prompt in enumerate(prompts):
            if progress:
                progress(number, len(prompts))
            kl, heads = _prompt(model, plan, prompt, restore=restore)
            kls.append(kl)
            restored.append(heads)
    return InContext(float(np.mean(kls)), np.mean(restored, axis=0) if restore else None)


def _prompt(model: Any, plan: KVPlan, prompt: Prompt, *, restore: bool) -> tuple[float, Floats]:
    C, spec = len(prompt.context), plan.model
    ids = torch.tensor([prompt.context + prompt.continuation], device=input_device(model))
    counts, shared = kept_rows(plan, C).tolist(), readers(model)
    context = DynamicCache(config=model.config)
    for index in spec.planned:
        actions = [
            entry.action
            for entry in plan.entries
            if entry.site.layer == index and isinstance(entry.action, KVAction)
        ]
        token = spec.image_token
        images = None if prompt.images is None or token is None else ids[:, :C].eq(token)
        context.layers[index] = Cut(actions, counts[index], shared[index], images)
    read(model, ids[:, :C], AttendingCache(context.layers), prompt.images)
    at_once = ids.shape[1] - C if continues_at_once(model) else 1

    def logits(batch: int, hidden: dict[int, Tensor]) -> Tensor:
        layers: list[Any] = []
        for index, own in enumerate(context.layers):
            if isinstance(own, Cut):
                layers.append(Ablation(own.record, hidden.get(index), shared[index]))
            else:
                layers.append(deepcopy(own))  # a layer that is not planned, after the context
                layers[-1].reorder_cache(torch.zeros(batch, dtype=torch.long))
        return replay(model, prompt, ids, layers, batch=batch, at_once=at_once)

    reference = logits(1, {})
    hidden = {index: context.layers[index].hidden for index in spec.planned}
    kl = float(kl_divergence(reference, logits(1, hidden))[0])
    if not restore:
        return kl, np.empty(0)
    sites = [(index, head) for index in spec.planned for head in range(spec.kv_heads)]
    found = []
    for start in range(0, len(sites), _REPLAYED):
        some = sites[start : start + _REPLAYED]
        batch = {index: own.repeat(len(some), 1, 1) for index, own in hidden.items()}
        for place, (index, head) in enumerate(some):
            batch[index][place, head] = False
        found.append(kl_divergence(reference, logits(len(some), batch)).cpu().numpy())
    return kl, np.concatenate(found).reshape(len(spec.planned), spec.kv_heads)


class Cut(AttendingLayer):
    """Reads a context like the stock model; knows then which of its tokens a plan evicts.

    `hidden` `[1, K, C]` (bool) are the evicted tokens, `record` holds the context's cache.
    """

    def __init__(
        self,
        actions: list[KVAction],
        counts: list[int],
        readers: int = 1,
        images: Tensor | None = None,
    ) -> None:
        super().__init__(readers)
        self.actions, self.counts, self.images = actions, counts, images
        self.record = LayerRecord({})
        self.hidden: Tensor | None = None

    def receive(self, key: Tensor, value: Tensor) -> None:
        self.record.key, self.record.value = key, value

    def attend(self, step: Step) -> Tensor:
        key, value = self.record.key, self.record.value
        assert key is not None
        assert value is not None
        if self.hidden is None:
            seen = Seen(step.query, key, value, step.scale)
            if any(needs_rotary(action.scorer) for action in self.actions):
                rotary = rotary_frequencies(step.module, key.shape[2], key.device)
                seen = replace(seen, rotary=Rotary(*rotary))
            self.hidden = torch.ones(1, *key.shape[1:3], dtype=torch.bool, device=key.device)
            for h, (action, count) in enumerate(zip(self.actions, self.counts, strict=True)):
                scores = score(action.scorer, seen.heads([h]))
                kept = kept_tokens(scores, [count], action, self.images)[0]
                self.hidden[0, h, kept] = False
        return causal_attention(step, key, value)
