"""What the linear layers of one full run are given, and what few bits make of the last ones.

Ranges are of whole tensors at one step, calls of all branches together.  Plans use their mean and
spread over prompts, which unlike running averages do not depend on the order of prompts.  The
layers that read what the last block returns are also computed with weights and activations in few
bits, each call within its own range: from the moments follows the correction of their output
channels, without a run under any plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from cacheplan.adapters.linears import given
from cacheplan.adapters.taps import Handler
from cacheplan.kernels.fake_quantize.naive import on_grid, weights_on_grid
from cacheplan.profilers.settings import FeatureSettings
from cacheplan.types import RANGE_UNIT

Floats = NDArray[np.float64]
BITS = 8  # of readers: first and last layers keep them also where others have fewer


class LinearStatistics:
    """Taps for one run; `step` tells the present one.  Results stay on the device until asked."""

    def __init__(self, settings: FeatureSettings, step: Callable[[], int]) -> None:
        self.settings, self.step = settings, step
        self._weights: dict[str, Tensor] = {}  # of readers, in few bits
        self._ranges: dict[str, dict[int, list[Tensor]]] = {p: {} for p in settings.linears}
        self._moments: dict[str, dict[int, list[Tensor]]] = {p: {} for p, _ in settings.readers}

    def handlers(self, paths: Mapping[str, str]) -> dict[str, Handler]:
        """Taps for the layers in `paths`: from the settings' path to that within its denoiser."""
        return {
            paths[path]: partial(self._see, path) for path in self.settings.linears if path in paths
        }

    def _see(self, path: str, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output, values, step = inner(*args, **kwargs), given(args, kwargs), self.step()
        if values.numel():
            ends = torch.stack(torch.aminmax(values))
            self._ranges[path].setdefault(step, []).append(ends)
            if path in self._moments:
                moments = self._compare(path, inner, values, ends, output)
                self._moments[path].setdefault(step, []).append(moments)
        return output

    def _compare(
        self, path: str, inner: Any, values: Tensor, ends: Tensor, output: Tensor
    ) -> Tensor:
        """`[C, 4]`: means of e, q, eq and q^2 of every output channel."""
        if path not in self._weights:
            self._weights[path] = weights_on_grid(inner.weight, BITS)
        low, high = ends.float()
        coarse = on_grid(values.float(), low.clamp(max=0), high.clamp(min=0), BITS)
        found = linear(coarse.to(values.dtype), self._weights[path], inner.bias)
        q = found.double().flatten(0, -2) / RANGE_UNIT
        e = output.double().flatten(0, -2) / RANGE_UNIT - q
        return torch.stack([term.mean(0) for term in (e, q, e * q, q * q)], dim=1)

    def found(self) -> dict[str, Floats]:
        """The statistics `activation_range` and `reader_moments`, without layers none."""
        steps, readers = self.settings.model.steps, self.settings.readers
        ranges = np.zeros((len(self.settings.linears), steps, 2))
        for own, known in zip(ranges, self._ranges.values(), strict=True):
            for step, calls in known.items():
                ends = torch.stack(calls).double().cpu().numpy()
                own[step] = min(ends[:, 0].min(), 0), max(ends[:, 1].max(), 0)
        moments = [np.zeros((channels, steps, 4)) for _, channels in readers]
        for table, seen in zip(moments, self._moments.values(), strict=True):
            for step, calls in seen.items():
                table[:, step] = torch.stack(calls).mean(0).cpu().numpy()
        return {
            **({"activation_range": ranges / RANGE_UNIT} if len(ranges) else {}),
            **({"reader_moments": np.concatenate(moments)} if moments else {}),
        }
