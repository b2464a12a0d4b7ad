"""Generate text under a plan and report times and bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cacheplan.errors import InputError
from cacheplan.inputs import prompts_for
from cacheplan.placement import Placement
from cacheplan.types import Plan


@dataclass(frozen=True)
class Generation:
    """A generated text, its times in seconds, and the bytes its cache planned and held."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    planned_bytes: int
    measured_bytes: int
    full_bytes: int
    path: str


def generate(
    plan: Plan,
    *,
    prompt: str | None = None,
    image: Path | None = None,
    model: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    on_text: Callable[[str], None] | None = None,
    prefill_chunk: int | None = None,
    placement: Placement | None = None,
) -> Generation:
    """Generate a continuation of `prompt` under the plan.

    `image` is shown to a vision-language model (see `adapters.images.read_image_text`).  Without a
    prompt, the embedded model gets its first held-out one.  Text goes to `on_text` as it appears.
    The prompt is read `prefill_chunk` tokens at a time, or at once.  `placement` divides a large
    model over devices.
    """
    import torch

    from cacheplan.adapters.images import call_arguments, read_image_text
    from cacheplan.adapters.language import load
    from cacheplan.adapters.offloading import input_device
    from cacheplan.plans.check import kv_only
    from cacheplan.plans.rows import full_bytes
    from cacheplan.runtime.install import apply
    from cacheplan.runtime.stream import TextStream

    plan = kv_only(plan, "generate")
    loaded = load(model or plan.model.id, device=device, dtype=dtype, placement=placement)
    images = None
    if image is not None:
        if prompt is None or not prompt.strip():
            raise InputError(f"The image {image} comes without words: give --prompt too.")
        ids, images = read_image_text(loaded.processor, prompt, image)
    elif prompt is None:
        first = prompts_for(loaded, None, "heldout", 0.8, 1)[0]
        ids = [*first.context, *first.continuation[: (first.answers or ((1, 2),))[0][0]]]
    elif not prompt.strip():
        raise InputError("The prompt is empty: give at least one word.")
    else:
        ids = loaded.tokenizer(prompt)["input_ids"]
    longest = loaded.spec.max_length
    if longest and len(ids) + max_new_tokens > longest:
        raise InputError(
            f"The prompt has {len(ids)} tokens and {max_new_tokens} are to follow, but the model "
            f"reads {longest}: shorten the prompt or lower --max-new-tokens."
        )
    inputs = torch.tensor([ids], device=input_device(loaded.model))
    pictured = call_arguments(loaded.model, images, 0, len(ids)) if images else {}
    stream = TextStream(loaded.tokenizer, on_text or (lambda text: None))
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    with apply(loaded.model, plan, prefill_chunk=prefill_chunk) as caches, torch.no_grad():
        started = time.perf_counter()
        loaded.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            **pictured,
            max_new_tokens=max_new_tokens,
            streamer=stream,
            **({"do_sample": False} | sampling),
        )
        ended = time.perf_counter()
    cache = caches[-1]
    size = cache.element_size
    prefill = (stream.first_at or ended) - started
    return Generation(
        prompt=loaded.tokenizer.decode(ids, skip_special_tokens=True),
        text=stream.text,
        prompt_tokens=len(ids),
        new_tokens=stream.tokens,
        prefill_seconds=prefill,
        decode_seconds=ended - started - prefill,
        planned_bytes=cache.planned_bytes,
        measured_bytes=cache.nbytes,
        full_bytes=full_bytes(plan.model, cache.tokens[0], size),
        path=cache.path,
    )
