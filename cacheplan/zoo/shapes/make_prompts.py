"""Write the embedded model's calibration and held-out prompts, from disjoint seeds.

python -m cacheplan.zoo.shapes.make_prompts OUT
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from cacheplan.zoo.shapes.drawing import random_scene

SPLITS = {"calibration": (10_000, 16), "heldout": (20_000, 32)}  # first seed, prompts
# how the pipeline is called, as long as nothing else is asked for
CALL = {
    "num_inference_steps": 30,
    "guidance_scale": 3.5,
    "max_sequence_length": 12,
    "use_resolution_binning": False,
    "clean_caption": False,
}


def lines(seed: int, count: int) -> list[str]:
    """One prompt per line of a `.jsonl` file, each with the seed of its noise."""
    prompts = random_scene(count, torch.Generator().manual_seed(seed)).prompts()
    return [json.dumps({"prompt": p, "seed": seed + i}) for i, p in enumerate(prompts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    for name, (seed, count) in SPLITS.items():
        (out / f"{name}.jsonl").write_text("\n".join(lines(seed, count)) + "\n", encoding="utf-8")
    (out / "call.json").write_text(json.dumps(CALL, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
