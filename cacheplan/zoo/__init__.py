"""Models that travel with the package, and the scripts that made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EMBEDDED_LANGUAGE_MODEL = "recall"
EMBEDDED_DIFFUSION_MODEL = "shapes"


def embedded_path(name: str) -> Path | None:
    """The folder of an embedded model, or None if no embedded model has that name."""
    if Path(name).name != name:  # a path of the user's own
        return None
    folder = Path(__file__).parent / name
    model = folder / "model"
    indexes = ("config.json", "model_index.json")
    return model if any((model / index).is_file() for index in indexes) else None


def embedded_prompts(name: str, split: str) -> Path:
    """The prompt file of an embedded model; `split` is "calibration" or "heldout"."""
    return Path(__file__).parent / name / f"{split}.jsonl"


def embedded_call(name: str) -> dict[str, Any]:
    """The settings that an embedded diffusion model is called with; none for other models."""
    path = Path(__file__).parent / name / "call.json"
    if embedded_path(name) is None or not path.is_file():
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8")))
