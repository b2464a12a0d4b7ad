"""The prompts that a command works on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cacheplan.errors import InputError
from cacheplan.types import Provenance

if TYPE_CHECKING:
    from cacheplan.adapters.language import LanguageModel
    from cacheplan.profilers.prompts import Prompt


def prompts_for(
    loaded: LanguageModel, path: Path | None, role: str, split: float, limit: int | None
) -> list[Prompt]:
    """The prompts in `path`, or those that come with an embedded model.

    `role` is "calibration" or "heldout".
    """
    from cacheplan.profilers.prompts import load_prompts
    from cacheplan.zoo import embedded_path, embedded_prompts

    name = loaded.spec.id
    if path is None:
        if embedded_path(name) is None:
            raise InputError(
                f'The model "{name}" brings no {role} prompts: give --prompts FILE (.txt or '
                ".jsonl) with texts like those it will serve."
            )
        path = embedded_prompts(name, role)
    return load_prompts(
        path,
        loaded.tokenizer,
        split=split,
        limit=limit,
        longest=loaded.spec.max_length,
        processor=loaded.processor,
        image_token=loaded.spec.image_token,
    )


def refuse_calibration(digest: str, origin: Provenance) -> None:
    """InputError if the prompts are those that the plan was made from."""
    if digest == origin.prompts:
        raise InputError(
            "These are the prompts the plan was calibrated on: verify on others, or the damage "
            "looks smaller than it is."
        )
