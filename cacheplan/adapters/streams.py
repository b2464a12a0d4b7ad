"""How a block takes and returns the streams it transforms: hidden states, often text with them.

Blocks of diffusers return one tensor, `(hidden, encoder)` or `(encoder, hidden)`, and `None` for
text that is not needed any more (SD3's last block).  Which of these it is shows at any call that
was computed: outputs are matched to arguments by shape, and equal shapes by diffusers' registry
or by closeness, since a block adds to what it is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cacheplan.adapters.calls import named, position, unwrapped
from cacheplan.errors import UnsupportedError

HIDDEN = "hidden_states"
ENCODER = "encoder_hidden_states"


@dataclass(frozen=True)
class Stream:
    """One tensor that a block transforms."""

    name: str  # of the parameter
    position: int  # among the positional parameters
    output: int  # in the returned tuple
    ends: bool = False  # None is returned for it


@dataclass(frozen=True)
class Streams:
    """The streams of one block, hidden states first."""

    streams: tuple[Stream, ...]
    returned: int  # length of the returned tuple; 0 for a bare tensor

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """The streams as the block is given them."""
        return tuple(
            kwargs[stream.name] if stream.name in kwargs else args[stream.position]
            for stream in self.streams
        )

    def results(self, output: Any) -> tuple[Tensor | None, ...]:
        """The streams as the block returned them; None for one that ends there."""
        if not self.returned:
            return (output,)
        return tuple(output[stream.output] for stream in self.streams)

    def rebuild(self, tensors: Sequence[Tensor | None]) -> Any:
        """An output of the block's form; from `take`, it is that of a block left out."""
        if not self.returned:
            return tensors[0]
        output: list[Tensor | None] = [None] * self.returned
        for stream, tensor in zip(self.streams, tensors, strict=True):
            if not stream.ends:
                output[stream.output] = tensor
        return tuple(output)


def observe(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Streams:
    """Find the streams of a block from one call that was computed."""
    given = {name: v for name, v in named(block, args, kwargs).items() if isinstance(v, Tensor)}
    outputs = list(output) if isinstance(output, tuple | list) else [output]
    places = [i for i, value in enumerate(outputs) if isinstance(value, Tensor)]
    found = _registered(block, given, outputs) or _closest(given, [outputs[i] for i in places])
    if found is None or any(v is not None and not isinstance(v, Tensor) for v in outputs):
        raise UnsupportedError(
            f"{type(unwrapped(block)).__name__} returns more than the hidden states it is given, "
            "so it cannot be left out of a step."
        )
    pairs = list(zip(found, places, strict=True))
    ending = [i for i, value in enumerate(outputs) if value is None]
    if ending and HIDDEN in found and ENCODER in given:
        pairs.append((ENCODER, ending[0]))
    order = list(given)
    pairs.sort(key=lambda pair: (pair[0] != HIDDEN, order.index(pair[0])))
    return Streams(
        tuple(
            Stream(name, position(block, name), at, ends=outputs[at] is None) for name, at in pairs
        ),
        len(outputs) if isinstance(output, tuple | list) else 0,
    )


def _registered(block: nn.Module, given: dict[str, Tensor], outputs: list[Any]) -> list[str] | None:
    """Names by place from diffusers' registry, if it knows the block and its shapes agree."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        known = TransformerBlockRegistry.get(type(unwrapped(block)))
    except ValueError:
        return None
    names = {
        known.return_hidden_states_index: known.hidden_states_argument_name,
        known.return_encoder_hidden_states_index: known.encoder_hidden_states_argument_name,
    }
    found = []
    for i, value in enumerate(outputs):
        if value is None:
            continue
        name = names.get(i)
        if name not in given or given[name].shape != value.shape:
            return None
        found.append(name)
    return found


def _closest(given: dict[str, Tensor], outputs: list[Tensor]) -> list[str] | None:
    """The names whose tensors have the outputs' shapes and are nearest to them."""
    options = []
    for output in outputs:
        names = [n for n, v in given.items() if v.shape == output.shape and v.dtype == output.dtype]
        options.append([n for n in names if n in (HIDDEN, ENCODER)] or names)
    choices = [c for c in itertools.product(*options) if len(set(c)) == len(c)]
    if not choices:
        return None
    if len(choices) == 1:
        return list(choices[0])

    def distance(choice: Iterable[str]) -> float:
        pairs = zip(choice, outputs, strict=True)
        return sum(float((output - given[name]).float().norm()) for name, output in pairs)

    return list(min(choices, key=distance))


def joined(before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> bool:
    """Whether a block is given (`after`) exactly what the one before it returned (`before`).

    Only then can a range of blocks be replaced as one.
    """
    return len(before) == len(after) and all(
        x is y or (x is not None and y is not None and _same(x, y))
        for x, y in zip(before, after, strict=True)
    )


def _same(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
