"""Prompts of a diffusion pipeline: what differs between calls, with the seed of the noise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheplan.errors import InputError


@dataclass(frozen=True)
class PicturePrompt:
    """One picture: keyword arguments of the pipeline as canonical JSON, and a seed."""

    arguments: str
    seed: int

    @property
    def call(self) -> dict[str, Any]:
        return dict(json.loads(self.arguments))

    @property
    def text(self) -> str:
        """What people call it."""
        call = self.call
        return str(call.get("prompt", call.get("class_labels", self.arguments)))


def picture_prompt(arguments: dict[str, Any], seed: int) -> PicturePrompt:
    return PicturePrompt(json.dumps(arguments, sort_keys=True, separators=(",", ":")), seed)


def load_picture_prompts(path: Path, *, limit: int | None) -> list[PicturePrompt]:
    """Read prompts: one per line.

    A `.jsonl` line is an object of keyword arguments of the pipeline (`{"prompt": ...}`, or
    `{"class_labels": [3]}`) with an optional `"seed"`; any other line is a text prompt.  Seeds
    not given are the line's number.  Raises InputError with one sentence.
    """
    if limit is not None and limit < 1:
        raise InputError(f"The limit is {limit} prompts, expected at least 1.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            prompts.append(
                _parse(line, number, where)
                if path.suffix == ".jsonl"
                else picture_prompt({"prompt": line.strip()}, number)
            )
    if not prompts:
        raise InputError(f"{path} holds no prompts: write one per line.")
    return prompts[:limit]


def _parse(line: str, number: int, where: str) -> PicturePrompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg}).") from error
    if not isinstance(record, dict) or not record.keys() - {"seed"}:
        raise InputError(
            f'{where} is no prompt, expected an object such as {{"prompt": "a red star"}}.'
        )
    seed = record.pop("seed", number)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"{where} has the seed {seed!r}, expected an integer of at least 0.")
    return picture_prompt(record, seed)


def digest(prompts: Sequence[PicturePrompt]) -> str:
    """sha256 over arguments and seeds, in order."""
    text = json.dumps([[prompt.arguments, prompt.seed] for prompt in prompts])
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
