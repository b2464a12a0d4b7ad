"""Held-out prompts for the comparison, and the same prompts with a question already asked."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from cacheplan.profilers.prompts import Prompt, load_prompts
from cacheplan.zoo.recall.make_prompts import CONTEXT, record

FIRST_SEED = 30_000  # calibration prompts are drawn from 10000 on, the embedded held-out from 20000
SPLIT = 0.8  # of plain texts, which have no mark where the context ends


def prompts_of(
    file: Path | None, tokenizer: Any, number: int, context: int = CONTEXT
) -> list[Prompt]:
    """The first `number` prompts of a file; without one, fresh ones of the embedded language.

    `context` is the length of fresh contexts in tokens.
    """
    if file is not None:
        return load_prompts(file, tokenizer, split=SPLIT, limit=number, longest=0)
    lines = [json.dumps(record(FIRST_SEED + i, context)) for i in range(number)]
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "fresh.jsonl"
        fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return load_prompts(fresh, tokenizer, split=SPLIT, limit=None, longest=0)


def asked_inside(prompt: Prompt) -> Prompt | None:
    """The prompt with its first question moved into the context, None if it asks nothing.

    All but the last word of the question is compressed with the context, so that a method may look
    at it; that word is the first to be read from the compressed cache.  What follows the answer is
    left out: those questions would not be known yet.
    """
    later = [answer for answer in prompt.answers if answer[0] > 1]
    if not later:
        return None
    start, end = later[0]
    return replace(
        prompt,
        context=prompt.context + prompt.continuation[: start - 1],
        continuation=prompt.continuation[start - 1 : end + 1],
        answers=((1, end - start + 1),),
    )
