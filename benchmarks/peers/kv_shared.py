"""What kvpress' presses of one context have in common, so that it is worked out once.

They compress after attention and leave its output as it is: each of them would see the same, under
every budget.  Nothing here knows of budgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import kvpress  # type: ignore[import-not-found]
import torch
from torch import Tensor
from transformers import DynamicCache

_BY_BUDGET = (kvpress.StreamingLLMPress, kvpress.CompactorPress)  # scores that depend on it
_CONTEXTS = 2  # that are remembered: a prompt's, and its context with the question in it
_scores: dict[tuple[int, ...], dict[Any, Tensor]] = {}


@dataclass(frozen=True)
class Attended:
    """What one attention module got and gave, and the keys and values it stored."""

    kwargs: dict[str, Any]
    output: Any
    keys: Tensor
    values: Tensor


@lru_cache(maxsize=2 * _CONTEXTS)  # some presses need another attention
def prefill(model: Any, ids: tuple[int, ...], attention: str) -> list[Attended]:
    """One pass over a context, layer after layer."""
    seen, cache = list[Attended](), DynamicCache()

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = cache.layers[module.layer_idx]
        seen.append(Attended(dict(kwargs), output, layer.keys, layer.values))

    hooks = [
        layer.self_attn.register_forward_hook(note, with_kwargs=True)
        for layer in model.model.layers
    ]
    model.set_attn_implementation(attention)
    try:
        with cache_positions(model):
            model.model(input_ids=torch.tensor([ids]), past_key_values=cache)
    finally:
        model.set_attn_implementation("sdpa")
        for hook in hooks:
            hook.remove()
    return seen


def ranked_once(press: Any, ids: tuple[int, ...], bits: int | None) -> Any:
    """The press, whose scorers hand out what they gave this context before, under any budget.

    They see keys and values as they are stored, in so many `bits`.
    """
    for found in _scorers(press):
        if not isinstance(found, _BY_BUDGET):
            found.score = _Remembered(found, f"{_options(found)} in {bits} bits", ids)
    return press


@dataclass(frozen=True)
class _Remembered:
    """The `score` of one scorer."""

    scorer: Any
    options: str
    ids: tuple[int, ...]

    def __call__(self, module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        known = _scores.setdefault(self.ids, {})
        while len(_scores) > _CONTEXTS:
            del _scores[next(iter(_scores))]
        key = self.options, module.layer_idx, hidden_states.shape[1]  # Compactor shows it a part
        if key not in known:
            score = type(self.scorer).score
            known[key] = score(self.scorer, module, hidden_states, *args, **kwargs)
        return known[key].clone()  # some presses mark tokens in the scores themselves


def _scorers(press: Any) -> Iterator[Any]:
    """The scorers inside a press that have none inside them."""
    inner = [v for v in vars(press).values() if isinstance(v, kvpress.ScorerPress)]
    for found in inner:
        yield from _scorers(found)
    if isinstance(press, _BY_BUDGET) or (not inner and isinstance(press, kvpress.ScorerPress)):
        yield press


def _options(scorer: Any) -> str:
    told = [f"{f.name}={getattr(scorer, f.name)!r}" for f in fields(scorer)]
    kept = [text for text in told if not text.startswith("compression_ratio=")]
    return f"{type(scorer).__name__} {' '.join(kept)}"


class _OnlyScores(kvpress.KVzipPress):  # type: ignore[misc]
    """KVzip up to its scores."""

    def compress_post(self, model: Any) -> None:
        self.found = self.score_val


@lru_cache(maxsize=2 * _CONTEXTS)  # with and without normalization
def zip_scores(model: Any, ids: tuple[int, ...], normalized: bool) -> Tensor:
    """KVzip's scores of a context, `[layers, 1, kv heads, tokens]`, not to be written to."""
    press = _OnlyScores(compression_ratio=0.5, kvzip_plus_normalization=normalized)
    with cache_positions(model), press(model):
        model.model(input_ids=torch.tensor([ids]), past_key_values=DynamicCache())
    found: Tensor = press.found
    return found


@contextmanager
def cache_positions(model: Any) -> Iterator[None]:
    """Tell attention modules the tokens' places in the cache, as transformers before 5.3 did."""

    def tell(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        past = kwargs["past_key_values"].get_seq_length(module.layer_idx)
        new = kwargs["hidden_states"].shape[1]
        return args, {**kwargs, "cache_position": torch.arange(past, past + new)}

    hooks = [
        layer.self_attn.register_forward_pre_hook(tell, with_kwargs=True)
        for layer in model.model.layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
