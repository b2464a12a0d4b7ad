"""Measure a plan against the full cache on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cacheplan.adapters.images import call_arguments, read
from cacheplan.adapters.offloading import input_device
from cacheplan.adapters.probe import continues_at_once
from cacheplan.plans.rows import full_bytes
from cacheplan.profilers.collect import Progress
from cacheplan.profilers.divergence import kl_divergence
from cacheplan.profilers.prompts import Prompt, digest
from cacheplan.runtime.cache import PlanCache
from cacheplan.runtime.language import following
from cacheplan.types import Damage, KVPlan


@dataclass(frozen=True)
class Verification:
    """Damage on the prompts, and bytes after each context, summed over prompts."""

    damage: Damage
    planned_bytes: int
    measured_bytes: int
    full_bytes: int
    kl_per_prompt: tuple[float, ...]


@torch.no_grad()
def measure_damage(
    model: Any, plan: KVPlan, prompts: Sequence[Prompt], *, progress: Progress | None = None
) -> Verification:
    """Compare full cache and plan on the continuation of every prompt.

    The context is read and compressed once; then the true continuation is fed and each next-token
    distribution compared (teacher forcing): in one call, or in steps of `decode_every` tokens for
    plans that evict while decoding.  The first continuation token is left out: it is predicted
    before anything is evicted.
    """
    totals = dict.fromkeys(("agreement", "nll", "full_nll", "tokens"), 0.0)
    recalled = full_recalled = answers = planned = measured = full = 0
    kls = []
    for number, prompt in enumerate(prompts):
        if progress:
            progress(number, len(prompts), "verifying")
        C = len(prompt.context)
        ids = torch.tensor([prompt.context + prompt.continuation], device=input_device(model))
        beside = call_arguments(model, prompt.images, 0, ids.shape[1])
        reference = model(input_ids=ids, use_cache=False, **beside).logits[0, C:-1]
        logits, cache = _planned_logits(model, plan, ids, prompt)
        planned += cache[0]
        measured += cache[1]
        full += full_bytes(plan.model, C, cache[2])
        kls.append(float(kl_divergence(reference[None], logits[None])))
        target = ids[0, C + 1 :]
        right, full_right = logits.argmax(-1) == target, reference.argmax(-1) == target
        totals["agreement"] += float((logits.argmax(-1) == reference.argmax(-1)).sum())
        totals["nll"] += _nll(logits, target)
        totals["full_nll"] += _nll(reference, target)
        totals["tokens"] += len(target)
        for start, end in prompt.answers:
            if start == 0:
                continue
            answers += 1
            recalled += bool(right[start - 1 : end - 1].all())
            full_recalled += bool(full_right[start - 1 : end - 1].all())
    if progress:
        progress(len(prompts), len(prompts), "done")
    tokens = totals["tokens"]
    damage = Damage(
        kl=sum(kls) / len(kls),
        agreement=totals["agreement"] / tokens,
        recall=recalled / answers if answers else None,
        full_recall=full_recalled / answers if answers else None,
        nll=totals["nll"] / tokens,
        full_nll=totals["full_nll"] / tokens,
        prompts=len(prompts),
        digest=digest(prompts),
    )
    return Verification(damage, planned, measured, full, tuple(kls))


def _planned_logits(
    model: Any, plan: KVPlan, ids: Tensor, prompt: Prompt
) -> tuple[Tensor, tuple[int, int, int]]:
    """Logits of the continuation under the plan; planned, measured and element bytes after it."""
    cache, context = PlanCache(plan, model), len(prompt.context)
    most = ids.shape[1] - context if continues_at_once(model) else 1
    with following(model, plan):
        read(model, ids[:, :context], cache, prompt.images)
        size = cache.element_size
        sizes = cache.planned_bytes, cache.nbytes, size
        step, logits = min(plan.trigger.decode_every or most, most), list[Tensor]()
        for start in range(context, ids.shape[1] - 1, step):
            part = ids[:, start : start + step][:, : ids.shape[1] - 1 - start]
            beside = call_arguments(model, prompt.images, start, start + part.shape[1])
            out = model(input_ids=part, past_key_values=cache, use_cache=True, **beside)
            logits.append(out.logits[0])
    return torch.cat(logits), sizes


def _nll(logits: Tensor, target: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits.float(), target, reduction="sum"))
