"""Between a cross-attention and its projections of the text: run them once, then hand on what
they returned.

Each keeps its keys or values per branch, from the first step of its denoiser to the last.  The
text itself is kept too, of the first projection alone, to see at every call that it is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cacheplan.adapters.linears import given
from cacheplan.errors import UnsupportedError
from cacheplan.runtime.features.store import storage_bytes
from cacheplan.runtime.features.values import Ready


class TextHandler:
    """Stands around one projection."""

    def __init__(self) -> None:
        self.given: Tensor | None = None  # in the present call
        self.fresh: Tensor | None = None
        self.idle()

    def idle(self) -> None:
        """Only run the projection."""
        self.keeps = False
        self.value: Ready | None = None

    def __call__(self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.given = given(args, kwargs)
        if self.value is not None:
            return self.value.alone()
        output = inner(*args, **kwargs)
        if self.keeps:
            self.fresh = output.clone()
        return output


class Texts:
    """What one denoiser keeps of the texts of a run, by branch; none where `paths` is empty."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.handlers = {path: TextHandler() for path in paths}
        self._kept: dict[int, list[Tensor]] = {}  # of the handlers, in their order
        self._given: dict[int, Tensor] = {}

    @property
    def bytes(self) -> int:
        kept = [tensor for tensors in self._kept.values() for tensor in tensors]
        return sum(map(storage_bytes, (*kept, *self._given.values())))

    def set(self, branch: int, *, first: bool) -> None:
        """Make the handlers ready for a call, at the first step of the denoiser or a later one."""
        for index, handler in enumerate(self.handlers.values()):
            handler.keeps = first
            handler.value = None if first else Ready(self._kept[branch][index])

    def collect(self, branch: int, *, first: bool) -> None:
        """A call is over; UnsupportedError if its text was not the one whose keys were used."""
        texts = [handler.given for handler in self.handlers.values()]
        fresh = [handler.fresh for handler in self.handlers.values()]
        self._let_go()
        text = next(iter(texts), None)
        if not first:
            if text is not None and not torch.equal(text, self._given[branch]):
                raise UnsupportedError(
                    "The text changes during the run, but the plan computes its keys and values "
                    "once: give the same text to all steps, or solve with another recipe."
                )
            return
        self._kept[branch] = [tensor for tensor in fresh if tensor is not None]
        if len(self._kept[branch]) < len(fresh):
            missing = list(self.handlers)[fresh.index(None)]
            raise UnsupportedError(
                f"The plan keeps what {missing} returns, but it is not called: undo the fusing of "
                "projections (unfuse_qkv_projections)."
            )
        if text is not None:
            self._given[branch] = text.clone()

    def idle(self) -> None:
        for handler in self.handlers.values():
            handler.idle()

    def forget(self) -> None:
        """A run begins or was broken off, or another denoiser takes over."""
        self._kept.clear()
        self._given.clear()
        self._let_go()

    def _let_go(self) -> None:
        for handler in self.handlers.values():
            handler.given = handler.fresh = None
