"""Apply a plan to a language model: `with apply(model, plan): model.generate(...)`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import DynamicCache

from cacheplan.adapters.attention import AttendingCache, attending, check_attention
from cacheplan.adapters.decoder import text_decoder
from cacheplan.adapters.language import describe
from cacheplan.errors import UnsupportedError
from cacheplan.plans.check import check_model
from cacheplan.runtime.cache import PlanCache
from cacheplan.runtime.images import images_in_prompts
from cacheplan.runtime.prefill import probes_behind_prompts, prompt_in_pieces
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
    memory never holds more than the plan's cache and one piece (`runtime.prefill`); None does as
    the plan says (`Trigger.prefill_chunk`).  A prompt that is not cut is the first call on an empty
    cache: do not hand `generate` a `prefill_chunk_size`, whose later chunks look like a second
    turn and would all stay.

    Raises ModelMismatchError if the plan was made for another model, UnsupportedError if the
    model or the plan is outside what the runtime does.
    """
    check_attention(model)
    check_model(plan, describe(model))
    PlanCache(plan, model)  # refuse here, not at the first forward call
    _refuse_generation_settings(model)
    decoder = text_decoder(model)
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
        if past is not None and any(getattr(layer, "record_past", False) for layer in past.layers):
            made[-1].activate_past_recording()  # windows and states that an assistant takes back
        return args, {**kwargs, "past_key_values": made[-1]}

    with ExitStack() as hooks:
        # first, so that the other hooks find the cache
        hooks.callback(decoder.register_forward_pre_hook(give_cache, with_kwargs=True).remove)
        hooks.enter_context(following(model, plan, prefill_chunk=prefill_chunk))
        yield made


@contextmanager
def following(model: Any, plan: KVPlan, *, prefill_chunk: int | None = None) -> Iterator[None]:
    """Make planned caches work that are passed as `past_key_values`, as `apply` does.

    For callers that have checked model and plan and make their own caches.
    """
    prefill_chunk = plan.trigger.prefill_chunk if prefill_chunk is None else prefill_chunk
    with (
        attending(model),
        images_in_prompts(model),
        prompt_in_pieces(model, prefill_chunk),
        probes_behind_prompts(model),
    ):
        yield


def _refuse_generation_settings(model: Any) -> None:
    settings = getattr(model, "generation_config", None)
    if getattr(settings, "prefill_chunk_size", None):
        raise UnsupportedError(
            "transformers' chunked prefill does not tell a plan where the prompt ends: set "
            "prefill_chunk_size=None and apply the plan with prefill_chunk."
        )
