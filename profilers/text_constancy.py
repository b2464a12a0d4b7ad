"""Whether the keys and values that cross-attention makes of a text are the same at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cacheplan.adapters.taps import Handler
from cacheplan.plans.compute import text_parts
from cacheplan.types import DiffusionSpec


class TextConstancy:
    """Compares what the projections of the text return with what they returned first in the run.

    `branch` tells for which branch of the guidance the denoiser is called.
    """

    def __init__(self, spec: DiffusionSpec, branch: Callable[[], int]) -> None:
        self.found = text_parts(spec.blocks)
        self.branch = branch
        self.constant = True  # so far, bit for bit
        self._first: dict[tuple[str, int], Tensor] = {}  # by projection and branch

    def handlers(self, paths: Mapping[str, str]) -> dict[str, Handler]:
        """Taps for the blocks in `paths`: from the spec's path to that within its denoiser."""
        return {
            f"{paths[block.path]}.{part.path}.{name}": partial(
                self._compare, f"{block.path}.{part.path}.{name}"
            )
            for block, part, text in self.found
            if block.path in paths
            for name in text.paths
        }

    def _compare(
        self, path: str, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        output: Tensor = inner(*args, **kwargs)
        key = path, self.branch()
        if key not in self._first:
            self._first[key] = output.clone()
        elif self.constant:
            self.constant = torch.equal(self._first[key], output)
        return output
