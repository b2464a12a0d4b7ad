"""The settings of a pipeline's call and of its scheduler, as plans keep them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

# settings of a call that do not reach the denoiser, or stand for its prompts
_NOT_SETTINGS = frozenset(
    "class_labels callback_steps clean_caption decode_noise_scale decode_timestep "
    "num_images_per_prompt num_videos_per_prompt return_dict".split()
)


def scheduler_settings(scheduler: Any) -> str:
    """Canonical JSON of a scheduler's class and configuration."""
    return _json({"class": type(scheduler).__name__, **public(scheduler.config)})


def prompts_of(call: Mapping[str, Any]) -> int:
    """How many latents the call makes, as far as its arguments say so; else 0."""
    each = call.get("num_images_per_prompt") or call.get("num_videos_per_prompt") or 1
    for name in ("prompt", "prompt_embeds", "class_labels"):
        value = call.get(name)
        if value is not None:
            return each * (1 if isinstance(value, str | int) else len(value))
    return 0


def call_settings(pipe: Any, call: Mapping[str, Any]) -> str:
    """Canonical JSON of the call's numbers and switches, with the pipeline's defaults for others.

    No prompts and no seeds.
    """
    settings = {}
    for name, parameter in inspect.signature(type(pipe).__call__).parameters.items():
        value = call.get(name, parameter.default)
        numbers = isinstance(value, list | tuple) and all(
            isinstance(item, int | float) for item in value
        )
        if name not in _NOT_SETTINGS and (isinstance(value, int | float) or numbers):
            settings[name] = value
    return _json(settings)


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what depends on the library's version or the file's place."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
