"""Write the embedded model's calibration and held-out prompts, from disjoint seeds.

    python -m cacheplan.zoo.recall.make_prompts OUT

Prompts are of two kinds that take turns: questions that nobody knows when the context is compressed
(query-agnostic), and one that stands at the context's end, so that a method may look at it.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from cacheplan.zoo.recall.grammar import BOS, WORDS, Mixture, Words, recall_prompt

CONTEXT, QUESTIONS = 400, 12
MIXTURE = Mixture(names=24, fact=0.2, question=0.03, copy=0.04)
SPLITS = {
    "calibration": (range(10_000, 10_024), CONTEXT),
    "heldout": (range(21_000, 21_048), CONTEXT),
}


def record(seed: int, context: int, language: Words = WORDS) -> dict[str, object]:
    """One prompt as a line of a `.jsonl` file; the tokenizer adds the first token itself."""
    rng = random.Random(seed)
    before, after, answers = recall_prompt(rng, context, QUESTIONS, MIXTURE, language)
    return {"context": before.removeprefix(f"{BOS} "), "continuation": after, "answers": answers}


def asked(later: dict[str, Any]) -> dict[str, object]:
    """The prompt with its first question moved into the context, all but the last word of it.

    That word is the first to be read from the compressed cache.  What follows the answer is left
    out: those questions would not be known yet.
    """
    text: str = later["continuation"]
    start, end = later["answers"][0]
    *question, last = text[:start].split()
    return {
        "context": f"{later['context']} {' '.join(question)}",
        "continuation": f"{last} {text[start:end]} .",
        "answers": [(len(last) + 1, len(last) + 1 + end - start)],
    }


def records(split: str) -> list[dict[str, object]]:
    seeds, context = SPLITS[split]
    found = [record(seed, context) for seed in seeds]
    return [asked(prompt) if i % 2 else prompt for i, prompt in enumerate(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    for name in SPLITS:
        lines = [json.dumps(prompt) for prompt in records(name)]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
