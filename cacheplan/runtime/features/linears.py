"""Linear layers whose weights and activations have few bits, simulated.

Numbers are rounded to what the bits can tell and multiplied as ordinary floats, so that errors can
be compared; nothing gets faster or smaller.  Modules keep their own weights: taps multiply with
rounded copies instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cacheplan.adapters.calls import unwrapped
from cacheplan.adapters.linears import given
from cacheplan.adapters.loop import Loop
from cacheplan.adapters.taps import Handler, compiled
from cacheplan.errors import UnsupportedError
from cacheplan.kernels.fake_quantize.naive import on_grid, weights_on_grid
from cacheplan.types import FeaturePlan, LinearEntry


class Linears:
    """The plan's layers, all denoisers together, at the present step of the run."""

    def __init__(self, plan: FeaturePlan, denoisers: Mapping[str, nn.Module]) -> None:
        """UnsupportedError where a layer is not there or cannot be stood in for."""
        self.step = 0
        self._handlers: dict[str, dict[str, Handler]] = {name: {} for name in denoisers}
        for entry in plan.linears:
            first = next(iter(denoisers))
            name = next((n for n in denoisers if entry.path.startswith(f"{n}.")), first)
            path = entry.path.removeprefix(f"{name}.")
            layer = _layer(denoisers[name], path)
            self._handlers[name][path] = partial(self._call, Rounded(entry, layer))

    def handlers(self, denoiser: str) -> dict[str, Handler]:
        """The taps of one denoiser, which belong beneath all others."""
        return self._handlers[denoiser]

    def following(self, on_call: Any) -> Any:
        """`on_call` of the loop, which also tells the step."""

        def told(loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.step = loop.step
            return on_call(loop, inner, args, kwargs)

        return told

    def _call(
        self, rounded: Rounded, inner: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        return rounded(given(args, kwargs), inner.bias, self.step)


class Rounded:
    """What one layer computes."""

    def __init__(self, entry: LinearEntry, layer: nn.Linear) -> None:
        self.entry = entry
        weight, self.bits = entry.action.weight, entry.action.activation.bits
        own = layer.weight.detach()
        self.weight = own if weight.format == "model" else weights_on_grid(own, weight.bits)
        self.ranges = torch.tensor(entry.ranges)
        self.scales = torch.tensor(entry.channel_scale)
        self.shifts = torch.tensor(entry.channel_shift)

    def __call__(self, values: Tensor, bias: Tensor | None, step: int) -> Tensor:
        self._move(values.device)
        if self.entry.ranges and any(self.entry.ranges[step]):
            low, high = self.ranges[step]
            values = on_grid(values.float(), low, high, self.bits).to(values.dtype)
        output = linear(values, self.weight, bias)
        corrected = output
        if len(self.scales):
            corrected = corrected * self.scales[step]
        if len(self.shifts):
            corrected = corrected + self.shifts[step]
        return corrected.to(output.dtype)

    def _move(self, device: torch.device) -> None:
        """To where the layer runs now: pipelines move their modules while they run."""
        if self.weight.device != device:
            for name in ("weight", "ranges", "scales", "shifts"):
                setattr(self, name, getattr(self, name).to(device))


def _layer(denoiser: nn.Module, path: str) -> nn.Linear:
    root = unwrapped(denoiser)
    try:
        layer = root.get_submodule(path)
    except AttributeError:
        layer = None
    if type(layer) is not nn.Linear:
        found = "none" if layer is None else type(layer).__name__
        raise UnsupportedError(
            f"The plan has few bits for a linear layer {path} of {type(root).__name__}, but there "
            f"is {found}: profile the pipeline as it is now and solve again."
        )
    above = [
        root,
        *(root.get_submodule(path.rsplit(".", n)[0]) for n in range(path.count(".") + 1)),
    ]
    if compiled(denoiser) or any(map(compiled, above)):
        raise UnsupportedError(
            f"The plan simulates few bits in {path}, which is compiled: do not compile the "
            "denoiser for this plan."
        )
    if layer.weight.is_meta or not layer.weight.is_floating_point():
        raise UnsupportedError(
            f"The weights of {path} are not in memory, so few bits cannot be simulated: load the "
            "pipeline without offloading its layers one by one."
        )
    return layer
