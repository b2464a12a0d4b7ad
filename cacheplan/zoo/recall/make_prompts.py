"""Write the embedded model's calibration and held-out prompts, from disjoint seeds.

python -m cacheplan.zoo.recall.make_prompts OUT
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from cacheplan.zoo.recall.grammar import BOS, Mixture, recall_prompt

CONTEXT, QUESTIONS = 400, 12
MIXTURE = Mixture(names=24, fact=0.2, question=0.03, copy=0.04)
SPLITS = {
    "calibration": (range(10_000, 10_024), CONTEXT),
    "heldout": (range(20_000, 20_048), CONTEXT),
}


def record(seed: int, context: int) -> dict[str, object]:
    """One prompt as a line of a `.jsonl` file; the tokenizer adds the first token itself."""
    before, after, answers = recall_prompt(random.Random(seed), context, QUESTIONS, MIXTURE)
    return {"context": before.removeprefix(f"{BOS} "), "continuation": after, "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    for name, (seeds, context) in SPLITS.items():
        lines = [json.dumps(record(seed, context)) for seed in seeds]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
