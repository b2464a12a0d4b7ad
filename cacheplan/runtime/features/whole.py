"""Leaving out a call of the denoiser: its output minus its latent input is what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cacheplan.adapters.calls import sample, with_sample
from cacheplan.errors import UnsupportedError
from cacheplan.runtime.features.values import Forecast


@dataclass(frozen=True, eq=False)
class Form:
    """What an output has besides the channels of its latent.

    A denoiser that learns the variance returns twice the channels.  One that is given a picture
    along with the latent (image to video) takes more than it returns.
    """

    output: Any  # with an empty sample
    beyond: Tensor  # the other channels, as they were last computed
    axis: int  # of the channels


def split(output: Any, latent: Tensor) -> tuple[Tensor, Form]:
    """Output minus latent, and the form of the output."""
    tensor = sample(output)
    axis = _channels(tensor.shape, latent.shape)
    both = min(tensor.shape[axis], latent.shape[axis])
    delta = tensor.narrow(axis, 0, both) - latent.narrow(axis, 0, both)
    beyond = tensor.narrow(axis, both, tensor.shape[axis] - both).clone()
    return delta.to(tensor.dtype), Form(with_sample(output, tensor.new_empty(0)), beyond, axis)


def join(value: Forecast, latent: Tensor, form: Form) -> Any:
    """The output that stands in for a call left out."""
    both = value.features[0].shape[form.axis]
    tensor: Tensor = value.added(latent.narrow(form.axis, 0, both))
    if form.beyond.numel():
        tensor = torch.cat([tensor, form.beyond], form.axis)
    return with_sample(form.output, tensor)


def _channels(output: torch.Size, latent: torch.Size) -> int:
    """The one dimension in which output and latent may differ."""
    differ = [axis for axis, (a, b) in enumerate(zip(output, latent, strict=False)) if a != b]
    if len(output) != len(latent) or len(differ) > 1:
        raise UnsupportedError(
            f"The denoiser returns {' x '.join(map(str, output))} numbers for a latent of "
            f"{' x '.join(map(str, latent))}, so whole calls cannot be left out: plan its blocks."
        )
    return differ[0] if differ else 1
