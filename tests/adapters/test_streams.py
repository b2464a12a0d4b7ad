"""How blocks take and return their streams, found from one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cacheplan.adapters.streams import Stream, Streams, joined, observe
from cacheplan.adapters.taps import Tap
from cacheplan.errors import UnsupportedError

HIDDEN, TEXT, SHORT = torch.randn(1, 6, 4), torch.randn(1, 6, 4), torch.randn(1, 3, 4)
BOTH = {"hidden_states": HIDDEN, "encoder_hidden_states": TEXT}
H, E = "hidden_states", "encoder_hidden_states"


class Single(nn.Module):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Any:
        return hidden_states + 0.1


class HiddenFirst(nn.Module):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Any = 0) -> Any:
        return hidden_states + 0.1, encoder_hidden_states + 0.1


class EncoderFirst(HiddenFirst):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Any = 0) -> Any:
        return encoder_hidden_states + 0.1, hidden_states + 0.1


class Ending(HiddenFirst):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Any = 0) -> Any:
        return None, hidden_states + 0.1


class Renamed(nn.Module):
    def forward(self, temb: Tensor, x: Tensor, text: Tensor) -> Any:
        return [x + 0.1, text + 0.1]


class More(nn.Module):
    def forward(self, hidden_states: Tensor) -> Any:
        return hidden_states + 0.1, hidden_states.mean()


def seen(block: nn.Module, *args: Any, **kwargs: Any) -> tuple[Streams, Any]:
    output = block(*args, **kwargs)
    return observe(block, args, kwargs, output), output


@pytest.mark.parametrize(
    ("block", "returned", "expected"),
    [
        (Single(), 0, (Stream(H, 0, 0),)),
        (HiddenFirst(), 2, (Stream(H, 0, 0), Stream(E, 1, 1))),
        (EncoderFirst(), 2, (Stream(H, 0, 1), Stream(E, 1, 0))),
        (Ending(), 2, (Stream(H, 0, 1), Stream(E, 1, 0, ends=True))),
    ],
)
@pytest.mark.parametrize("text", [TEXT, SHORT])
def test_forms_of_blocks(
    block: nn.Module, returned: int, expected: tuple[Stream, ...], text: Tensor
) -> None:
    """Also where both streams have the same shape, and for taps around the block."""
    for module in (block, Tap(block, lambda inner, args, kwargs: inner(*args, **kwargs))):
        for args, kwargs in (
            ((HIDDEN, text), {}),
            ((HIDDEN,), {E: text}),
            ((), {H: HIDDEN, E: text}),
        ):
            streams, output = seen(module, *args, **kwargs)
            assert streams == Streams(expected, returned)
            assert all(
                x is y for x, y in zip(streams.take(args, kwargs), (HIDDEN, text), strict=False)
            )
            rebuilt = streams.rebuild(streams.results(output))
            assert type(rebuilt) is type(output)
            for x, y in zip(
                rebuilt if returned else [rebuilt], output if returned else [output], strict=True
            ):
                assert x is y


def test_a_block_left_out_hands_on_what_it_was_given() -> None:
    streams, _ = seen(Ending(), **BOTH)
    assert streams.rebuild(streams.take((), BOTH)) == (None, HIDDEN)
    streams, _ = seen(EncoderFirst(), **BOTH)
    assert streams.rebuild(streams.take((), BOTH)) == (TEXT, HIDDEN)


def test_other_names_are_matched_by_shape_and_closeness() -> None:
    streams, output = seen(Renamed(), torch.randn(1, 4), HIDDEN, TEXT)
    assert [stream.name for stream in streams.streams] == ["x", "text"]
    assert streams.results(output) == tuple(output)


def test_a_block_that_returns_more_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="More returns more than the hidden states"):
        seen(More(), HIDDEN)


def test_diffusers_registry_is_asked_first() -> None:
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    block = FluxTransformerBlock(8, 2, 4)
    output = HIDDEN + 100, TEXT + 100  # (encoder, hidden) as Flux says, whatever is closer
    streams = observe(block, (HIDDEN, TEXT), {}, output)
    assert [(s.name, s.output) for s in streams.streams] == [(H, 1), (E, 0)]


def test_blocks_are_joined_if_nothing_happens_between_them() -> None:
    assert joined((HIDDEN, None), (HIDDEN, None))
    assert joined((HIDDEN,), (HIDDEN.view(1, 6, 4),))
    assert not joined((HIDDEN,), (HIDDEN.clone(),))
    assert not joined((HIDDEN, TEXT), (HIDDEN,))
    assert not joined((), (HIDDEN,))
    assert not joined((HIDDEN, None), (HIDDEN, TEXT))
