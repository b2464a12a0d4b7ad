"""Between a block and one of its parts: run it, keep what it returns, or return a value instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cacheplan.adapters.calls import latent, mapped
from cacheplan.runtime.features.store import Feature
from cacheplan.runtime.features.values import Forecast, Ready


class PartHandler:
    """Stands around one part; what it returns may be a tensor or a tuple of tensors."""

    def __init__(self) -> None:
        self.fresh: Feature = None
        self.idle()

    def idle(self) -> None:
        """Only run the part."""
        self.keeps = False
        self.value: Forecast | Ready | None = None
        self.probe: Callable[[Tensor], None] | None = None  # told of what the part is given

    def __call__(self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.value is not None:
            return self.value.alone()
        if self.probe is not None:
            self.probe(latent(inner, args, kwargs))
        output = inner(*args, **kwargs)
        if self.keeps:
            self.fresh = mapped(output, torch.clone)
        return output
