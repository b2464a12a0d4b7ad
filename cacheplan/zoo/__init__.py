"""Models that travel with the package, and the scripts that made them."""

from __future__ import annotations

from pathlib import Path

EMBEDDED_LANGUAGE_MODEL = "recall"


def embedded_path(name: str) -> Path | None:
    """The folder of an embedded model, or None if no embedded model has that name."""
    folder = Path(__file__).parent / name
    return folder / "model" if (folder / "model" / "config.json").is_file() else None


def embedded_prompts(name: str, split: str) -> Path:
    """The prompt file of an embedded model; `split` is "calibration" or "heldout"."""
    return Path(__file__).parent / name / f"{split}.jsonl"
