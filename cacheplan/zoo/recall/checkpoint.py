"""The file from which an interrupted training goes on."""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cacheplan.atomic import atomic_write
from cacheplan.errors import InputError

MINUTES = 3.0  # between two writings


class Checkpoint:
    """Keeps the state of the training that `identity` describes, written whole or not at all."""

    def __init__(self, path: Path, identity: str, *, minutes: float = MINUTES) -> None:
        self.path, self.identity, self.seconds = path, identity, 60 * minutes
        self._written = time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """The last state, None if there is none; InputError if it is of another training."""
        if not self.path.exists():
            return None
        try:
            found = torch.load(self.path, weights_only=True)
            known = found["identity"] == self.identity
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError):
            known = False
        if not known:
            raise InputError(
                f"{self.path} is not of a training with these arguments: repeat those it was "
                "begun with, or delete it to begin anew."
            )
        state: dict[str, Any] = found["state"]
        return state

    def write(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write the state if the last writing was `minutes` ago."""
        if time.monotonic() - self._written < self.seconds:
            return
        data = io.BytesIO()
        torch.save({"identity": self.identity, "state": state()}, data)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, data.getvalue())
        self._written = time.monotonic()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
