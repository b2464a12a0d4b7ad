"""What is put in place of a feature that is not computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cacheplan.adapters.calls import mapped
from cacheplan.errors import UnsupportedError
from cacheplan.kernels.forecast.dispatch import combine
from cacheplan.kernels.forecast.naive import MOST
from cacheplan.runtime.features.store import Feature
from cacheplan.types import FeatureAction

# per action, number of channels and device: factor and summand of the channels
Constants = dict[tuple[int, int, torch.device], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Forecast:
    """`channel_scale * (sum_i weights_i features_i + shift) + channel_shift`, not yet computed.

    The action's scale is in the weights.
    """

    features: Sequence[Feature]
    weights: tuple[float, ...]
    action: FeatureAction
    constants: Constants

    def alone(self) -> Feature:
        """The value, in memory of its own."""
        return _zipped(lambda *t: self._leaf(t[:-1], None), (*self.features, self.features[0]))

    def added(self, base: Feature) -> Feature:
        """The value plus `base`, which stays as it is; where the value is None, `base` itself."""
        return _zipped(lambda *t: self._leaf(t[:-1], t[-1]), (*self.features, base))

    def _leaf(self, features: tuple[Tensor, ...], add: Tensor | None) -> Tensor:
        first = features[0]
        axis = channel_axis(first, self.action)
        scale, shift = self._channels(first.shape[axis], first.device)
        moved = [feature.movedim(axis, -1) for feature in features]
        base = None if add is None else add.movedim(axis, -1)
        value = weighted_sum(moved, self.weights, scale, shift, base).movedim(-1, axis)
        return value.clone() if value.data_ptr() == first.data_ptr() else value

    def _channels(self, size: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Factor and summand per channel, with the scalar shift folded in."""
        action, key = self.action, (id(self.action), size, device)
        if key not in self.constants:
            scales, shifts = action.channel_scale, action.channel_shift or (0.0,) * size
            folded = [
                a * action.shift + b for a, b in zip(scales or (1.0,) * size, shifts, strict=True)
            ]
            self.constants[key] = (
                torch.tensor(scales, device=device) if scales else None,
                torch.tensor(folded, device=device) if any(folded) else None,
            )
        return self.constants[key]


@dataclass(frozen=True, eq=False)
class Ready:
    """A value computed beforehand, outside of compiled code."""

    value: Feature

    def alone(self) -> Feature:
        return mapped(self.value, torch.clone)

    def added(self, base: Feature) -> Feature:
        return _zipped(lambda value, tensor: tensor + value, (self.value, base))


def weighted_sum(
    features: Sequence[Tensor],
    weights: Sequence[float],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """`kernels.forecast` for any number of features; it takes `MOST` at a time."""
    if len(weights) > MOST:
        add = weighted_sum(features[MOST:], weights[MOST:], scale, None, add)
    return combine(features[: min(MOST, len(weights))], weights[:MOST], scale, shift, add)


def channel_axis(tensor: Tensor, action: FeatureAction) -> int:
    """The dimension of the channels: the last of tokens `[B, N, C]`, the second of pictures."""
    channels = len(action.channel_scale) or len(action.channel_shift)
    axis = tensor.dim() - 1 if tensor.dim() <= 3 or not channels else 1
    if channels and tensor.shape[axis] != channels:
        found = [at for at in range(1, tensor.dim()) if tensor.shape[at] == channels]
        if len(found) != 1:
            raise UnsupportedError(
                f"The plan corrects {channels} channels, but the feature has the shape "
                f"{' x '.join(map(str, tensor.shape))}: correct all channels of one dimension."
            )
        axis = found[0]
    return axis


def _zipped(function: Any, values: Sequence[Any]) -> Any:
    """`function` over tensors at the same place; where one is None, the last as it is."""
    if any(value is None for value in values):
        return values[-1]
    if isinstance(values[0], Tensor):
        return function(*values)
    return type(values[0])(_zipped(function, items) for items in zip(*values, strict=True))
