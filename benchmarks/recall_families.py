"""Kinds of prompts in a recall model's language, for plans measured on one, used on another.

`after`: twelve questions behind the context, as in the embedded prompts.  `inside`: the first
question stands in the context, up to its last word, and only its answer counts.  `copies`: the
context ends with 48 random words, which then come again.  `filler`: few facts, and mostly filler
behind them.  `longer`: as `after`, with a context of 1000 words instead of 400.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from cacheplan.zoo.recall.grammar import (
    BOS,
    WORDS,
    Document,
    Mixture,
    Words,
    answer_spans,
    invented_words,
)
from cacheplan.zoo.recall.make_prompts import CONTEXT, MIXTURE, asked, record

LANGUAGE = "language.json"  # beside a model that does not speak the embedded one's words
COPIED, LONGER = 48, 1000
SPARSE = Mixture(names=24, fact=0.1, question=0.01, copy=0.02)
CALIBRATION, HELDOUT = 50_000, 60_000  # first seeds; the embedded prompts' are 10000 and 20000
_APART = 1_000  # seeds between two kinds

Line = dict[str, object]


def after(seed: int, language: Words) -> Line:
    return record(seed, CONTEXT, language)


def longer(seed: int, language: Words) -> Line:
    return record(seed, LONGER, language)


def inside(seed: int, language: Words) -> Line:
    return asked(record(seed, CONTEXT, language))


def copies(seed: int, language: Words) -> Line:
    rng = random.Random(seed)
    doc = Document(rng, MIXTURE, language)
    while len(doc) < CONTEXT - COPIED:
        doc.sentence()
    words = rng.choices([*language.names, *language.values, *language.filler], k=COPIED)
    known = [False] * 2 + [True] * (COPIED - 2)  # the first two tell where it begins
    return _line([*doc.words, *words], words, known)


def filler(seed: int, language: Words) -> Line:
    rng = random.Random(seed)
    doc = Document(rng, SPARSE, language)
    while len(doc) < CONTEXT or len(doc.facts) < 3:
        doc.sentence()
    start, asked = len(doc), rng.sample(list(doc.facts), 3)
    for key in asked:
        for _ in range(3):
            doc.filler()
        doc.question(key)
    return _line(doc.words[:start], doc.words[start:], doc.answer[start:])


FAMILIES: dict[str, Callable[[int, Words], Line]] = {
    "after": after,
    "inside": inside,
    "copies": copies,
    "filler": filler,
    "longer": longer,
}


def write(path: Path, kinds: Sequence[str], number: int, first: int, language: Words) -> Path:
    """Write `number` prompts, the kinds taking turns; seeds count from `first` for each kind."""
    places = list(FAMILIES)
    lines = []
    for i in range(number):
        kind = kinds[i % len(kinds)]
        seed = first + _APART * places.index(kind) + i
        lines.append(json.dumps(FAMILIES[kind](seed, language)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def language_of(model: str | None) -> Words:
    """The words that a recall model knows; None is the embedded one."""
    file = None if model is None else Path(model) / LANGUAGE
    if file is None or not file.is_file():
        return WORDS
    return invented_words(json.loads(file.read_text(encoding="utf-8"))["invented_words"])


def _line(context: list[str], words: list[str], answered: list[bool]) -> Line:
    return {
        "context": " ".join(context).removeprefix(f"{BOS} "),
        "continuation": " ".join(words),
        "answers": answer_spans(words, answered),
    }
