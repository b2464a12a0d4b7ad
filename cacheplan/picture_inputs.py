"""What a diffusion pipeline is called with: the pipeline, the settings of its call, its prompts."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheplan.errors import InputError

if TYPE_CHECKING:
    from cacheplan.profilers.feature_prompts import PicturePrompt
    from cacheplan.types import FeaturePlan

STEPS = "num_inference_steps"


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A loaded pipeline, the name that plans show, and the settings it is called with."""

    pipe: Any
    name: str
    call: dict[str, Any]

    def accepts(self, argument: str) -> bool:
        return argument in _accepted(self.pipe)


def open_pipeline(
    name: str | None,
    settings: Mapping[str, Any],
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> Pipeline:
    """Load a pipeline to be called with `settings`; see `whole_call`."""
    from cacheplan.adapters.denoiser import load
    from cacheplan.zoo import EMBEDDED_DIFFUSION_MODEL, embedded_path

    name = name or EMBEDDED_DIFFUSION_MODEL
    pipe = load(name, device=device, dtype=dtype)
    shown = str(Path(name).resolve()) if Path(name).exists() and not embedded_path(name) else name
    return Pipeline(pipe, shown, whole_call(pipe, name, settings))


def whole_call(pipe: Any, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` over those of an embedded model; the number of steps is always among them."""
    from cacheplan.zoo import embedded_call

    accepted = _accepted(pipe)
    for key in settings:
        if key not in accepted:
            raise InputError(f"{type(pipe).__name__} has no setting {key}{_hint(key, accepted)}.")
    call = {**embedded_call(name), **settings}
    if STEPS in accepted and not isinstance(call.get(STEPS), int):
        call[STEPS] = accepted[STEPS].default
    return call


def open_for_plan(
    plan: FeaturePlan,
    *,
    model: str | None,
    settings: Mapping[str, Any],
    device: str | None,
    dtype: str | None,
) -> Pipeline:
    """Load the plan's pipeline, called as it was profiled.

    Raises ModelMismatchError if `settings` say otherwise, or if it is another pipeline.
    """
    from cacheplan.adapters.denoiser import pipeline_digest
    from cacheplan.adapters.settings import call_settings, scheduler_settings
    from cacheplan.plans.check import check_model

    opened = open_pipeline(model or plan.model.id, {}, device=device, dtype=dtype)
    known = {k: v for k, v in json.loads(plan.model.call).items() if opened.accepts(k)}
    call = {**opened.call, **known, **whole_call(opened.pipe, "", {**known, **settings})}
    here = replace(
        plan.model,
        id=opened.name,
        pipeline=type(opened.pipe).__name__,
        scheduler=scheduler_settings(opened.pipe.scheduler),
        call=call_settings(opened.pipe, call),
        digest=pipeline_digest(opened.pipe),
    )
    check_model(plan, here)
    return replace(opened, call=call)


def read_settings(text: str | None) -> dict[str, Any]:
    """The settings in `--call`: a JSON object, or the file that holds one."""
    if text is None:
        return {}
    found = read_object(text, "--call")
    for key, value in found.items():
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int | float) for item in items):
            raise InputError(
                f"--call sets {key} to {value!r}, expected a number, true, false or a list of "
                "numbers: what differs between pictures belongs into the lines of --prompts."
            )
    return found


def read_object(text: str, option: str) -> dict[str, Any]:
    """A JSON object, given as such or as the name of its file."""
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise InputError(
                f'{option} is "{text}", neither a JSON object nor a file that can be read '
                f"({reason})."
            ) from error
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{option} is not JSON ({error.msg} at character {error.pos}): write something like "
            "'{\"height\": 512}'."
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{option} holds a {type(found).__name__}, expected a JSON object.")
    return found


def picture_prompts_for(
    opened: Pipeline, path: Path | None, role: str, limit: int | None
) -> list[PicturePrompt]:
    """The prompts in `path`, or those of an embedded model (`role` "calibration" or "heldout")."""
    from cacheplan.profilers.feature_prompts import load_picture_prompts
    from cacheplan.zoo import embedded_path, embedded_prompts

    if path is None:
        if embedded_path(opened.name) is None:
            raise InputError(
                f'The pipeline "{opened.name}" brings no {role} prompts: give --prompts FILE '
                "(.txt or .jsonl) with prompts like those it will serve."
            )
        path = embedded_prompts(opened.name, role)
    prompts = load_picture_prompts(path, limit=limit)
    check_prompts(opened, prompts)
    return prompts


def check_prompts(opened: Pipeline, prompts: Sequence[PicturePrompt]) -> None:
    """InputError for arguments that the pipeline does not take, or that belong to the call."""
    from cacheplan.adapters.settings import call_settings

    accepted = _accepted(opened.pipe)
    usual = json.loads(call_settings(opened.pipe, opened.call))
    for prompt in prompts:
        for key in prompt.call:
            if key not in accepted:
                raise InputError(
                    f'{type(opened.pipe).__name__} takes no {key}, but the prompt "{prompt.text}" '
                    f"gives one{_hint(key, accepted)}."
                )
        own = json.loads(call_settings(opened.pipe, {**opened.call, **prompt.call}))
        for key, value in own.items():
            if usual.get(key) != value:
                raise InputError(
                    f'The prompt "{prompt.text}" sets {key}, which must be alike for all: give '
                    "it in --call."
                )


def _accepted(pipe: Any) -> dict[str, inspect.Parameter]:
    """What a user may give to the pipeline."""
    ours = {"self", "generator", "latents", "output_type", "return_dict", "callback", "kwargs"}
    found = inspect.signature(type(pipe).__call__).parameters
    return {k: v for k, v in found.items() if k not in ours and not k.startswith("callback_")}


def _hint(key: str, accepted: Mapping[str, Any]) -> str:
    close = get_close_matches(key, accepted, n=1)
    return f": did you mean {close[0]}" if close else ""
