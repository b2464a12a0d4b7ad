"""Linear layers of a denoiser: which there are, and what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cacheplan.adapters.anatomy import is_unet


def linears_below(root: nn.Module, path: str) -> list[str]:
    """Paths in `root` of the plain linear layers in the module at `path`, in its order.

    Layers of other classes, such as those of adapters or with few bits already, are not among
    them.
    """
    found = root.get_submodule(path).named_modules(prefix=path)
    return [name for name, module in found if type(module) is nn.Linear]


def linears_outside(root: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Those of a transformer that are in none of the `blocks`."""
    if is_unet(root):
        return []
    inside = tuple(f"{path}." for path in blocks)
    return [
        name
        for name, module in root.named_modules()
        if type(module) is nn.Linear and not name.startswith(inside)
    ]


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a linear layer's call."""
    found: Tensor = args[0] if args else kwargs["input"]
    return found
