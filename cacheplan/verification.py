"""Measure a plan against the full cache on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

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


@dataclass
class _Tally:
    """Sums over prompts, of a plan or of the full cache."""

    kls: list[float] = field(default_factory=list)
    agreement: int = 0
    nll: float = 0.0
    recalled: int = 0
    planned_bytes: int = 0
    measured_bytes: int = 0
    full_bytes: int = 0


def measure_damage(
    model: Any, plan: KVPlan, prompts: Sequence[Prompt], *, progress: Progress | None = None
) -> Verification:
    """Compare full cache and plan on the continuation of every prompt; see `measure_plans`."""
    return measure_plans(model, [plan], prompts, progress=progress)[0]


@torch.no_grad()
def measure_plans(
    model: Any,
    plans: Sequence[KVPlan],
    prompts: Sequence[Prompt],
    *,
    progress: Progress | None = None,
) -> list[Verification]:
    """Compare the full cache with each plan on the continuation of every prompt.

    The context is read and compressed once; then the true continuation is fed and each next-token
    distribution compared (teacher forcing): in one call, or in steps of `decode_every` tokens for
    plans that evict while decoding.  The first continuation token is left out: it is predicted
    before anything is evicted.
    """
    full, tallies, tokens, answers = _Tally(), [_Tally() for _ in plans], 0, 0
    for number, prompt in enumerate(prompts):
        if progress:
            progress(number, len(prompts), "verifying")
        C = len(prompt.context)
        ids = torch.tensor([prompt.context + prompt.continuation], device=input_device(model))
        beside = call_arguments(model, prompt.images, 0, ids.shape[1])
        reference = model(input_ids=ids, use_cache=False, **beside).logits[0, C:-1]
        target = ids[0, C + 1 :]
        asked = [(start - 1, end - 1) for start, end in prompt.answers if start > 0]
        tokens, answers = tokens + len(target), answers + len(asked)
        _count(full, reference, target, asked)
        for plan, tally in zip(plans, tallies, strict=True):
            logits, cache = _planned_logits(model, plan, ids, prompt)
            _count(tally, logits, target, asked)
            tally.kls.append(float(kl_divergence(reference[None], logits[None])))
            tally.agreement += int((logits.argmax(-1) == reference.argmax(-1)).sum())
            tally.planned_bytes += cache[0]
            tally.measured_bytes += cache[1]
            tally.full_bytes += full_bytes(plan.model, C, cache[2])
    if progress:
        progress(len(prompts), len(prompts), "done")
    own = digest(prompts)
    return [
        Verification(
            Damage(
                kl=sum(tally.kls) / len(tally.kls),
                agreement=tally.agreement / tokens,
                recall=tally.recalled / answers if answers else None,
                full_recall=full.recalled / answers if answers else None,
                nll=tally.nll / tokens,
                full_nll=full.nll / tokens,
                prompts=len(prompts),
                digest=own,
            ),
            tally.planned_bytes,
            tally.measured_bytes,
            tally.full_bytes,
            tuple(tally.kls),
        )
        for tally in tallies
    ]


def _count(tally: _Tally, logits: Tensor, target: Tensor, asked: list[tuple[int, int]]) -> None:
    """Add what does not depend on the full cache: likelihood, and answers that are all right."""
    right = logits.argmax(-1) == target
    tally.nll += float(cross_entropy(logits.float(), target, reduction="sum"))
    tally.recalled += sum(bool(right[start:end].all()) for start, end in asked)


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
