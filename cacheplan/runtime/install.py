"""`with apply(model, plan): ...`: install a plan of any family, and restore the model."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, overload

from cacheplan.errors import InputError
from cacheplan.types import FeaturePlan, KVPlan, Plan

if TYPE_CHECKING:
    from cacheplan.runtime.cache import PlanCache
    from cacheplan.runtime.features.report import FeatureReport


@overload
def apply(
    model: Any, plan: KVPlan, *, prefill_chunk: int | None = None
) -> AbstractContextManager[deque[PlanCache]]: ...
@overload
def apply(
    model: Any, plan: FeaturePlan, *, cache_memory: int | None = None
) -> AbstractContextManager[FeatureReport]: ...
@overload
def apply(
    model: Any, plan: Plan, *, cache_memory: int | None = None, prefill_chunk: int | None = None
) -> AbstractContextManager[deque[PlanCache] | FeatureReport]: ...


def apply(
    model: Any, plan: Plan, *, cache_memory: int | None = None, prefill_chunk: int | None = None
) -> AbstractContextManager[Any]:
    """Make every call of a language model or diffusion pipeline follow `plan` until the block ends.

    The `with` statement yields, for a language model, a queue that holds the newest cache
    (`language.apply_cache`; prompts may be read in pieces of `prefill_chunk` tokens), and for a
    pipeline a report of the newest run, whose kept features may take `cache_memory` bytes
    (`features.apply.apply_features`).

    Raises ModelMismatchError if the plan was made for another model, UnsupportedError if the
    model or the plan is outside what the runtime does.
    """
    if isinstance(plan, FeaturePlan):
        from cacheplan.runtime.features.apply import apply_features

        if prefill_chunk is not None:
            raise InputError(
                f"prefill_chunk={prefill_chunk} was given with a plan for a diffusion model, which "
                "reads no prompt in pieces: leave it out."
            )
        return apply_features(model, plan, cache_memory=cache_memory)
    if cache_memory is not None:
        raise InputError(
            f"cache_memory={cache_memory} was given with a plan for a KV cache, but limits the "
            "features of diffusion models: solve the plan for a budget in bytes instead."
        )
    from cacheplan.runtime.language import apply_cache

    return apply_cache(model, plan, prefill_chunk=prefill_chunk)
