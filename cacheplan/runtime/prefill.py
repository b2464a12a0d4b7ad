"""How prompts are read: in pieces that bound the memory, and with probes behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cacheplan.adapters.decoder import text_decoder
from cacheplan.errors import InputError, UnsupportedError
from cacheplan.runtime.cache import PlanCache

_SLICED = ("input_ids", "inputs_embeds")  # tokens along dimension 1
_PASSED = ("past_key_values", "use_cache", "output_attentions", "output_hidden_states")
_WHOLE = ("attention_mask", "position_ids", "cache_position", *_SLICED, *_PASSED, "return_dict")


@contextmanager
def prompt_in_pieces(model: torch.nn.Module, chunk: int | None) -> Iterator[None]:
    """Split the first call on an empty `PlanCache` where it should not be read at once.

    With `chunk`, prompts are read that many tokens at a time: the cache never holds more than what
    the plan keeps of the whole prompt and one piece.  Each piece's attention sees what earlier
    evictions have left, so results differ from a prefill in one piece (as in EpiCache's blocks,
    arXiv 2509.17396).

    Assisted decoding sends its first guesses along with the prompt and asks for `logits_to_keep`
    of one token more than it guessed.  Guesses may be taken back, so they follow in a piece of
    their own, after the eviction.

    The call returns the hidden states of all tokens, as if it had been one.  Raises InputError for
    a chunk below 1, UnsupportedError for calls that cannot be cut.
    """
    if chunk is not None and chunk < 1:
        raise InputError(f"The prefill chunk is {chunk} tokens, expected at least 1.")
    decoder = text_decoder(model)
    earlier: list[Tensor] = []  # hidden states of the pieces before the last
    inside, guesses = False, 0

    def count_guesses(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal guesses
        asked = kwargs.get("logits_to_keep")
        guesses = max(0, asked - 1) if isinstance(asked, int) else 0

    def cut(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal inside
        cache = kwargs.get("past_key_values")
        if inside or not isinstance(cache, PlanCache) or cache.get_seq_length() > 0:
            return None
        earlier.clear()  # a call that failed may have left some
        if chunk is None and guesses == 0:
            return None
        length = _length(args, kwargs)
        prompt = length - guesses if guesses < length else length
        ends = [*range(chunk or prompt, prompt, chunk or prompt), prompt]
        ends += [length] if prompt < length else []
        if len(ends) == 1:
            return None
        pieces = _pieces(kwargs, ends)
        if chunk is not None:
            cache.expect(_tokens(kwargs, prompt))
        inside = True
        try:
            earlier.extend(module(**piece).last_hidden_state for piece in pieces[:-1])
        finally:
            inside = False
        return (), pieces[-1]

    def join(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if not inside and earlier:
            output.last_hidden_state = torch.cat([*earlier, output.last_hidden_state], dim=1)
            earlier.clear()
        return output

    hooks = [
        model.register_forward_pre_hook(count_guesses, with_kwargs=True),
        decoder.register_forward_pre_hook(cut, with_kwargs=True),
        decoder.register_forward_hook(join, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def probes_behind_prompts(model: torch.nn.Module) -> Iterator[None]:
    """After the call that fills a `PlanCache`, read the tokens by which the plan scores the prompt.

    The call returns what it would without them, and the cache holds the prompt alone.
    """
    decoder = text_decoder(model)

    def probe(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, PlanCache) and not cache.probing:
            cache.read_probes(module, kwargs)

    hook = decoder.register_forward_hook(probe, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    if args:
        raise UnsupportedError(
            "A prompt given by position cannot be read in pieces: pass input_ids=... by name."
        )
    for name in _SLICED:
        if kwargs.get(name) is not None:
            return int(kwargs[name].shape[1])
    raise UnsupportedError("There is no prompt to read in pieces: pass input_ids.")


def _pieces(kwargs: dict[str, Any], ends: list[int]) -> list[dict[str, Any]]:
    odd = [
        name
        for name, value in kwargs.items()
        if name not in _WHOLE and isinstance(value, Tensor | list | tuple)
    ]
    mask = kwargs.get("attention_mask")
    if odd or (mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2)):
        raise UnsupportedError(
            f"A prompt with {odd[0] if odd else 'a mask of its own'} cannot be read in pieces: "
            "apply the plan without prefill_chunk, and generate without an assistant."
        )
    return [_piece(kwargs, start, end) for start, end in pairwise([0, *ends])]


def _piece(kwargs: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    piece = dict(kwargs)
    for name in _SLICED:
        if kwargs.get(name) is not None:
            piece[name] = kwargs[name][:, start:end]
    if kwargs.get("attention_mask") is not None:
        piece["attention_mask"] = kwargs["attention_mask"][:, :end]
    for name in ("position_ids", "cache_position"):
        if kwargs.get(name) is not None:
            piece[name] = kwargs[name][..., start:end]
    return piece


def _tokens(kwargs: dict[str, Any], prompt: int) -> list[int]:
    """Tokens of the prompt per batch entry, without padding."""
    mask = kwargs.get("attention_mask")
    if mask is not None:
        return [int(n) for n in mask[:, :prompt].bool().sum(-1)]
    batch = next(kwargs[name].shape[0] for name in _SLICED if kwargs.get(name) is not None)
    return [prompt] * int(batch)
