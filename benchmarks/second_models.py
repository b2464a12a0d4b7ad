"""Make a second language model and a second diffusion model, for nothing to be tuned to the first.

    python benchmarks/second_models.py OUT [--only language|diffusion]

The language model (`OUT/recall_qwen3`) is a Qwen3 of other sizes that speaks made-up words, trained
by the embedded model's own script; half an hour on two CPU cores.  The diffusion model
(`OUT/patterns_dit`) is a class-conditional DiT of patterns (`second_dit.py`); 12 minutes.  Each
folder brings its prompts along.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from cacheplan.zoo.recall.grammar import invented_words

sys.path.insert(0, str(Path(__file__).parent))  # also under PYTHONSAFEPATH

import second_dit
from recall_families import CALIBRATION, HELDOUT, LANGUAGE, write

SEED = 7  # of the weights, the training texts and the words
PROMPTS = {"calibration": (24, CALIBRATION), "heldout": (200, HELDOUT)}
CHECKED = 20  # prompts whose answers are counted when the training has ended


def make_language_model(out: Path) -> None:
    command = [sys.executable, "-m", "cacheplan.zoo.recall.train", str(out)]
    command += ["--seed", str(SEED), "--shape", "qwen3", "--invented-words", str(SEED)]
    subprocess.run([*command, "--last", "1.5e6"], check=True)
    bring_prompts(out)


def bring_prompts(out: Path) -> None:
    """Put the language and the prompts beside the weights."""
    (out / LANGUAGE).write_text(json.dumps({"invented_words": SEED}) + "\n", encoding="utf-8")
    for name, (number, first) in PROMPTS.items():
        write(out / f"{name}.jsonl", ["after", "inside"], number, first, invented_words(SEED))


@torch.no_grad()
def recall(folder: Path) -> dict[str, Any]:
    """The share of answers that the full cache gives right, on the first held-out prompts."""
    from cacheplan.adapters.language import load
    from cacheplan.profilers.prompts import load_prompts

    loaded = load(str(folder))
    prompts = load_prompts(
        folder / "heldout.jsonl", loaded.tokenizer, split=0.8, limit=CHECKED, longest=0
    )
    right, asked = 0, 0
    for prompt in prompts:
        ids = torch.tensor([prompt.context + prompt.continuation])
        found = loaded.model(input_ids=ids, use_cache=False).logits[0].argmax(-1)
        begin = len(prompt.context)
        for start, end in prompt.answers:
            said = found[begin + start - 1 : begin + end - 1].tolist()
            right += tuple(said) == prompt.continuation[start:end]
            asked += 1
    return {"recall": right / asked, "questions": asked, "architecture": loaded.spec.architecture}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=["language", "diffusion"])
    parser.add_argument("--minutes", type=float, default=12.0, help="of the DiT's training")
    options = parser.parse_args()
    if options.only != "diffusion":
        make_language_model(options.out / "recall_qwen3")
        print(json.dumps(recall(options.out / "recall_qwen3")))
    if options.only != "language":
        second_dit.train(options.out / "patterns_dit", SEED, options.minutes)


if __name__ == "__main__":
    main()
