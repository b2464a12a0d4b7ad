"""Run a diffusion pipeline from a seed: the final latent, and the picture if it is wanted."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cacheplan.adapters.loop import Loop, watching
from cacheplan.adapters.taps import replaced


@dataclass(frozen=True, eq=False)
class Sampled:
    """`latent` is what the scheduler returned last, with the batch; `pictures` are PIL images."""

    latent: Tensor
    pictures: list[Any] | None


def run_pipeline(
    pipe: Any, call: Mapping[str, Any], *, seed: int, pictures: bool = False
) -> Sampled:
    """Call the pipeline with the keyword arguments `call` and noise from `seed`.

    The noise is drawn on the CPU, so that every device starts from the same.  Latents are not
    decoded unless `pictures` is set.
    """
    latents: list[Tensor] = []

    def on_step(loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = inner(*args, **kwargs)
        latents[:] = [output[0] if isinstance(output, tuple) else output.prev_sample]
        return output

    accepted = inspect.signature(type(pipe).__call__).parameters
    own = {"generator": torch.Generator().manual_seed(seed)}
    if not pictures and "output_type" in accepted:
        own["output_type"] = "latent"  # type: ignore[assignment]
    silent = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
    with watching(pipe, on_step=on_step), replaced(pipe, {"_progress_bar_config": silent}):
        given = {name: value for name, value in own.items() if name in accepted}
        output = pipe(**{**call, **given})
    found = getattr(output, "images", None) if pictures else None
    return Sampled(latents[0], list(found) if found is not None else None)
