"""Where the parts of a model lie that is too large for one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Placement:
    """The arguments of that name of transformers' `from_pretrained`.

    `device_map` is "auto" (or another of transformers' strategies), a device, or the device of
    every module by its path; `max_memory` is in bytes, by number of the GPU or "cpu"; what the map
    puts on "disk" is read from the checkpoint, or from `offload_folder` where it must be converted.
    """

    device_map: str | Mapping[str, int | str] = "auto"
    max_memory: Mapping[int | str, int] | None = None
    offload_folder: Path | None = None
