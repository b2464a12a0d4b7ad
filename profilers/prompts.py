"""Calibration and evaluation prompts: a context to compress and a continuation to judge by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheplan.adapters.images import Images, read_image_text
from cacheplan.errors import InputError

MINIMUM_CONTEXT, MINIMUM_CONTINUATION = 16, 2  # tokens


@dataclass(frozen=True)
class Prompt:
    """Token ids of one text; `answers` are half-open token ranges within the continuation.

    `images` are those that the context shows, if any.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    answers: tuple[tuple[int, int], ...] = ()
    images: Images | None = None


def load_prompts(
    path: Path,
    tokenizer: Any,
    *,
    split: float,
    limit: int | None,
    longest: int,
    processor: Any = None,
    image_token: int | None = None,
) -> list[Prompt]:
    """Read and tokenise prompts.

    A `.jsonl` file holds one object per line: `{"context": ..., "continuation": ...}` with
    optional `"answers": [[start, end], ...]` (character ranges in the continuation), or
    `{"text": ...}`.  Either may have `"image": "file.png"`, found from the folder of the prompts,
    which the model's `processor` puts into the context (`adapters.images`).  A `.txt` file holds
    texts separated by blank lines.  A plain text is cut after the share `split` of its tokens.
    `longest` is the model's length in tokens, 0 if unbounded.  Raises InputError with one
    sentence that names the file and line.
    """
    if not 0 < split < 1:
        raise InputError(f"The split is {split}, expected a share between 0 and 1, such as 0.8.")
    if limit is not None and limit < 1:
        raise InputError(f"The limit is {limit} prompts, expected at least 1.")
    prompts = []
    for where, record in _records(path)[:limit]:
        if "image" in record:
            prompt = _with_image(record, tokenizer, processor, split, where, path.parent)
            if image_token in prompt.continuation:
                raise InputError(
                    f"{where} shows its image after the context, which ends at {split} of the "
                    'text: give "context" and "continuation".'
                )
        else:
            prompt = _tokenise(record, tokenizer, split, where)
        size = len(prompt.context) + len(prompt.continuation)
        if longest and size > longest:
            raise InputError(
                f"{where} has {size} tokens but the model reads {longest}: shorten the text."
            )
        if len(prompt.context) < MINIMUM_CONTEXT or len(prompt.continuation) < MINIMUM_CONTINUATION:
            raise InputError(
                f"{where} has {len(prompt.context)} context and {len(prompt.continuation)} "
                f"continuation tokens, expected at least {MINIMUM_CONTEXT} and "
                f"{MINIMUM_CONTINUATION}: give longer texts."
            )
        prompts.append(prompt)
    return prompts


def digest(prompts: Sequence[Prompt]) -> str:
    """sha256 over the token ids, cuts, answers and images, in order."""
    content = [
        [p.context, p.continuation, p.answers, *([p.images.digest] if p.images else [])]
        for p in prompts
    ]
    return "sha256:" + hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every prompt of the file with the words that name its place."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}): give a .txt or .jsonl file."
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path.") from error
    if "\0" in text:
        raise InputError(f"{path} is binary, expected text: give a .txt or .jsonl file.")
    if path.suffix == ".jsonl":
        records = [
            (f"{path} line {number}", _parse(line, f"{path} line {number}"))
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    elif path.suffix == ".txt":
        texts = [part for part in text.split("\n\n") if part.strip()]
        records = [(f"{path} text {i}", {"text": part}) for i, part in enumerate(texts, 1)]
    else:
        raise InputError(
            f'{path} has the ending "{path.suffix}", expected .txt (texts separated by blank '
            "lines) or .jsonl (one object per line)."
        )
    if not records:
        raise InputError(f"{path} holds no prompts: add at least one text.")
    return records


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg}): one object per line.") from error
    fields = {"text"}, {"context", "continuation"}, {"context", "continuation", "answers"}
    if not isinstance(record, dict) or set(record) - {"image"} not in fields:
        raise InputError(
            f'{where} must be an object with "text", or with "context", "continuation" and '
            'optionally "answers", and may have an "image".'
        )
    for name in set(record) - {"answers"}:
        if not isinstance(record[name], str):
            raise InputError(f'{where}: "{name}" must be a string.')
    return record


def _tokenise(record: dict[str, Any], tokenizer: Any, split: float, where: str) -> Prompt:
    if "text" in record:
        ids = tokenizer(record["text"])["input_ids"]
        cut = round(split * len(ids))
        return Prompt(tuple(ids[:cut]), tuple(ids[cut:]))
    return _continued(record, tokenizer, tokenizer(record["context"])["input_ids"], None, where)


def _with_image(
    record: dict[str, Any], tokenizer: Any, processor: Any, split: float, where: str, folder: Path
) -> Prompt:
    image = folder / record["image"]
    ids, images = read_image_text(processor, record.get("text") or record["context"], image)
    if "text" in record:
        cut = round(split * len(ids))
        return Prompt(tuple(ids[:cut]), tuple(ids[cut:]), images=images)
    return _continued(record, tokenizer, ids, images, where)


def _continued(
    record: dict[str, Any], tokenizer: Any, context: list[int], images: Images | None, where: str
) -> Prompt:
    spans = record.get("answers", [])
    encoded = tokenizer(
        record["continuation"], add_special_tokens=False, return_offsets_mapping=bool(spans)
    )
    answers = [_token_range(span, encoded["offset_mapping"], where) for span in spans]
    return Prompt(tuple(context), tuple(encoded["input_ids"]), tuple(answers), images)


def _token_range(span: Any, offsets: list[tuple[int, int]], where: str) -> tuple[int, int]:
    try:
        start, end = span
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    except (TypeError, ValueError):
        inside = []
    if not inside:
        raise InputError(
            f'{where}: the answer {span} is no [start, end] range of characters in "continuation".'
        )
    return inside[0], inside[-1] + 1
