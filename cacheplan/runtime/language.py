"""Apply a plan to a language model: `with apply(model, plan): model.generate(...)`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import DynamicCache

from cacheplan.adapters.attention import AttendingCache, attending, check_attention
from cacheplan.adapters.language import describe
from cacheplan.errors import UnsupportedError
from cacheplan.plans.check import check_model
from cacheplan.runtime.cache import PlanCache
from cacheplan.runtime.prefill import prompt_in_pieces
from cacheplan.types import KVPlan


@contextmanager
def apply_cache(
    model: Any, plan: KVPlan, *, prefill_chunk: int | None = None
) -> Iterator[deque[PlanCache]]:
    """Make every generation of `model` follow `plan` until the block ends.

    A forward call without a cache, or with an empty stock one as `generate` makes, gets a
    `PlanCache`; other stock caches are refused, as they would bypass the plan.  The `with`
    statement yields a queue that holds the newest cache and no older one.  Whoever manages
    `past_key_values` passes `PlanCache(plan)` instead.  Leaving the block restores
    attention and hooks exactly.

    `prefill_chunk` reads prompts in pieces of that many tokens and evicts after each, so that
    memory never holds more than the plan's cache and one piece (`runtime.prefill`).  Without it
    the first call on an empty cache is taken for the whole prompt: do not hand `generate` a
    `prefill_chunk_size`, whose later chunks look like a second turn and would all stay.

    Raises ModelMismatchError if the plan was made for another model, UnsupportedError if the
    model or the plan is outside what the runtime does.
    """
    check_attention(model)
    check_model(plan, describe(model))
    PlanCache(plan, model)  # refuse here, not at the first forward call
    _refuse_generation_settings(model)
    decoder = model.get_decoder()
    made: deque[PlanCache] = deque(maxlen=1)  # a server must not collect its caches

    def give_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        past = kwargs.get("past_key_values")
        if isinstance(past, AttendingCache) or (past is None and kwargs.get("use_cache") is False):
            return None
        if past is not None and (type(past) is not DynamicCache or past.get_seq_length() > 0):
            raise UnsupportedError(
                f"A {type(past).__name__} holding {past.get_seq_length()} tokens was passed while "
                "a plan is applied, which would bypass it: pass PlanCache(plan) or no cache."
            )
        made.append(PlanCache(plan, model))
        return args, {**kwargs, "past_key_values": made[-1]}

    with attending(model), ExitStack() as hooks:
        hooks.callback(decoder.register_forward_pre_hook(give_cache, with_kwargs=True).remove)
        hooks.enter_context(prompt_in_pieces(model, prefill_chunk))
        yield made


def _refuse_generation_settings(model: Any) -> None:
    settings = getattr(model, "generation_config", None)
    if getattr(settings, "prefill_chunk_size", None):
        raise UnsupportedError(
            "transformers' chunked prefill does not tell a plan where the prompt ends: set "
            "prefill_chunk_size=None and apply the plan with prefill_chunk."
        )
