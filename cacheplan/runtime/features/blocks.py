"""Between a denoiser and its blocks: run them, leave them out, and note what ranges of them add.

Handlers hold the state of the present call, set beforehand by the executor; they decide nothing.
So compiled code can run through them: each attribute is one value it is compiled for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cacheplan.adapters.calls import hollow, sample, with_sample
from cacheplan.adapters.streams import Streams, joined, observe
from cacheplan.errors import UnsupportedError
from cacheplan.runtime.features.store import Feature
from cacheplan.runtime.features.values import Forecast, Ready

# what a block does
RUN = "run"
ADD = "add"  # return the input plus a value
PASS = "pass"  # return the input
PUT = "put"  # return a value
BRANCH = "branch"  # of a UNet: return a value
HOLLOW = "hollow"  # of a UNet: return anything of the right shape


class Span:
    """Blocks in a row, seen as one: what they were given and what is kept of them.

    `part` is "delta" (output minus input of each stream), "hidden" (output of each stream) or
    "branch" (a UNet's output).
    """

    def __init__(self, part: str) -> None:
        self.part = part
        self.inputs: tuple[Tensor, ...] = ()
        self.fresh: Feature = None

    def close(self, outputs: tuple[Tensor | None, ...]) -> None:
        if self.part == "delta":
            self.fresh = tuple(
                None if after is None else after - before
                for before, after in zip(self.inputs, outputs, strict=True)
            )
        else:
            self.fresh = tuple(None if tensor is None else tensor.clone() for tensor in outputs)
        self.inputs = ()


class BlockHandler:
    """Stands around one block."""

    def __init__(self, path: str, *, unet: bool) -> None:
        self.path, self.unet = path, unet
        self.streams: Streams | None = None
        self.empty: Any = None  # an output of a UNet's block, without its numbers
        self.within = ""  # the range, in words, whose first block is an earlier one
        self.idle()

    def idle(self) -> None:
        """Only run the block."""
        self.mode = RUN
        self.value: Forecast | Ready | None = None
        self.opens: tuple[Span, ...] = ()
        self.closes: tuple[Span, ...] = ()
        self.peek = False  # run for what a part tells; what is returned counts in mode RUN only
        self.probe: Callable[[Tensor, Tensor], None] | None = None
        self.observer: Observer | None = None

    def __call__(self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.unet:
            return self._unet(inner, args, kwargs)
        output = None
        if self.mode == RUN or self.peek:
            if self.observer is not None:
                output = self.observer(self, inner, args, kwargs)
            else:
                output = inner(*args, **kwargs)
        if self.mode == RUN:  # perhaps since a part has been seen
            if self.opens or self.closes or self.probe is not None:
                self._note(args, kwargs, output)
            return output
        assert self.streams is not None
        if self.mode == PASS:
            return self.streams.rebuild(self.streams.take(args, kwargs))
        assert self.value is not None
        if self.mode == ADD:
            return self.streams.rebuild(self.value.added(self.streams.take(args, kwargs)))
        return self.streams.rebuild(self.value.alone())

    def _note(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert self.streams is not None
        given, returned = self.streams.take(args, kwargs), self.streams.results(output)
        for span in self.opens:
            span.inputs = given
        for span in self.closes:
            span.close(returned)
        if self.probe is not None and returned[0] is not None:
            self.probe(given[0], returned[0])

    def _unet(self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.mode == RUN:
            output = inner(*args, **kwargs)
            self.empty = hollow(output)
            for span in self.closes:
                span.close((sample(output),))
            return output
        if self.mode == BRANCH:
            assert self.value is not None
            return with_sample(self.empty, self.value.alone()[0])
        return self.empty


class Observer:
    """Finds out, at one computed call, how blocks take and return their streams."""

    def __init__(self) -> None:
        self._before: tuple[Tensor | None, ...] = ()  # what the last block returned

    def __call__(
        self, handler: BlockHandler, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the block for `handler`."""
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        versions = [_version(tensor) for tensor in given]
        output = inner(*args, **kwargs)
        if versions != [_version(tensor) for tensor in given]:
            raise UnsupportedError(
                f"The block {handler.path} writes to its own input, so what it adds cannot be "
                "kept: plan parts of it instead."
            )
        handler.streams = observe(inner, args, kwargs, output)
        taken = handler.streams.take(args, kwargs)
        if handler.within and not joined(self._before, taken):
            raise UnsupportedError(
                f"The plan keeps the {handler.within} as one, but {handler.path} is given "
                "something else than the block before returns: plan ranges that start there."
            )
        self._before = handler.streams.results(output)
        return output


def _version(tensor: Tensor) -> int:
    """Counts the writes to a tensor; torch.inference_mode does not count."""
    return 0 if tensor.is_inference() else tensor._version
