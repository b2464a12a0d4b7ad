"""What a call of a denoiser or block is made of: arguments by name, latent, timestep, output."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

from torch import Tensor, nn

from cacheplan.adapters.taps import Tap
from cacheplan.errors import UnsupportedError

TIMESTEP = ("timestep", "timesteps", "t", "time")  # in the denoisers of diffusers


def unwrapped(module: Any) -> Any:
    """The module itself, inside of taps and of `torch.compile`'s wrapper."""
    while True:
        if isinstance(module, Tap):
            module = module.inner
        elif "_orig_mod" in getattr(module, "_modules", ()):
            module = module._orig_mod
        else:
            return module


def parameters(module: Any) -> tuple[str, ...]:
    """Names of the parameters of a module's forward."""
    # of the class: the forward of an instance may be wrapped, by accelerate for example
    kind: Any = type(unwrapped(module))
    return _parameters(kind)


@functools.cache
def _parameters(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, positional ones first."""
    return {**dict(zip(parameters(module), args, strict=False)), **kwargs}


def position(module: nn.Module, name: str) -> int:
    """Where a parameter stands among the positional ones."""
    return parameters(module).index(name)


def latent(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The latent that a denoiser is called with: its first parameter."""
    name = parameters(module)[0]
    value = named(module, args, kwargs).get(name)
    if not isinstance(value, Tensor):
        raise UnsupportedError(
            f'{type(unwrapped(module)).__name__} takes {type(value).__name__} as "{name}", '
            "but only denoisers whose latent is one tensor can be planned."
        )
    return value


def timestep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The timestep that a denoiser is called with (tensor or number); None if it takes none."""
    given = named(module, args, kwargs)
    return next((given[name] for name in TIMESTEP if given.get(name) is not None), None)


def sample(output: Any) -> Tensor:
    """The tensor of a denoiser's output: a tensor, a tuple that begins with it, or `.sample`."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    elif not isinstance(output, Tensor):
        output = getattr(output, "sample", None)
    if not isinstance(output, Tensor):
        raise UnsupportedError(
            "The denoiser's output has no tensor in first place, so its features cannot be planned."
        )
    return output


def with_sample(output: Any, tensor: Tensor) -> Any:
    """An output of the same form as `output` that holds `tensor` as its sample."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple | list):
        return type(output)([tensor, *output[1:]])
    return dataclasses.replace(output, sample=tensor)


def tensors(value: Any) -> tuple[Tensor, ...]:
    """All tensors in a module's output, in order; containers may be nested."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, tuple | list):
        return tuple(tensor for item in value for tensor in tensors(item))
    return ()


def mapped(value: Any, function: Any) -> Any:
    """The same containers with `function` applied to every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(mapped(item, function) for item in value)
    return value


def hollow(value: Any) -> Any:
    """Zeros of the same shapes that take no memory: an output nobody is going to read."""
    return mapped(value, lambda tensor: tensor.new_zeros(()).expand(tensor.shape))
