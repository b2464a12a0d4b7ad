"""What every arm is measured by: logits after the compressed context, bytes, and step times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cacheplan.profilers.divergence import kl_divergence
from cacheplan.profilers.prompts import Prompt

WARMUP = 3  # steps that are not timed


@dataclass(frozen=True)
class Held:
    """A cache after its context, and the bytes that its method counts for it.

    `logical` leaves out what is only masked; None where the cache itself holds no more than that.
    """

    cache: Any
    logical: int | None = None


@dataclass(frozen=True)
class Arm:
    """One method under one budget.

    `read(model, ids)` lets the model read tokens `[1, C]` and returns the compressed cache.
    `following` is the block around every call that uses the cache, `at_once` another one under
    which many tokens may follow in one call, with the same logits as one by one.  With `every`,
    the continuation is read in pieces of so many tokens, as the method evicts again after each.
    """

    name: str
    family: str
    read: Callable[[Any, Tensor], Held]
    following: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    at_once: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    every: int | None = None
    note: str = ""


@dataclass
class Score:
    """Damage and bytes of one arm on one prompt.

    `logical` bytes are after the context, without what is only masked, `physical` are the storages
    at that moment, and `stepped` those after one more token, None where that was not asked for.
    """

    kl: float
    nll: float
    agreement: float
    right: int
    answers: int
    logical: int
    physical: int
    stepped: int | None


@torch.no_grad()
def full_logits(model: Any, prompt: Prompt) -> Tensor:
    """Logits `[T - 1, V]` of the continuation by the whole text, without its first token.

    The first is predicted before anything is evicted, so that it says nothing.
    """
    ids = torch.tensor([prompt.context + prompt.continuation])
    found: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt.context) : -1]
    return found


@torch.no_grad()
def measure(
    model: Any, arm: Arm, prompt: Prompt, reference: Tensor, *, stepped: bool = True
) -> Score:
    """Read the context, compress it, read the true continuation and compare (teacher forcing)."""
    with arm.following(model):
        held = arm.read(model, torch.tensor([prompt.context]))
        physical = stored_bytes(held.cache)
        with arm.at_once(model):
            logits, after_a_step = list[Tensor](), None
            if stepped:
                logits.append(_following(model, held.cache, prompt, 0, 1))
                after_a_step = stored_bytes(held.cache)
            logits.append(continued(model, held.cache, prompt, arm.every, len(logits)))
    found, target = torch.cat(logits), torch.tensor(prompt.continuation[1:])
    best = found.argmax(-1)
    right = best == target
    recalled = [bool(right[a - 1 : b - 1].all()) for a, b in prompt.answers if a > 0]
    return Score(
        kl=float(kl_divergence(reference[None], found[None])),
        nll=float(torch.nn.functional.cross_entropy(found.float(), target)),
        agreement=float((best == reference.argmax(-1)).float().mean()),
        right=sum(recalled),
        answers=len(recalled),
        logical=physical if held.logical is None else held.logical,
        physical=physical,
        stepped=after_a_step,
    )


@torch.no_grad()
def stepwise_difference(model: Any, arm: Arm, prompt: Prompt, steps: int) -> float:
    """The largest difference of logits between `steps` single steps and one call of them all."""
    few = Prompt(prompt.context, prompt.continuation[: steps + 1])
    found = []
    for at_once in (False, True):
        with arm.following(model):
            held = arm.read(model, torch.tensor([few.context]))
            with arm.at_once(model) if at_once else nullcontext():
                found.append(continued(model, held.cache, few, None if at_once else 1))
    return float((found[0] - found[1]).abs().max())


@torch.no_grad()
def timed(model: Any, arm: Arm, prompt: Prompt, steps: int) -> tuple[float, int]:
    """Median seconds (CPU time of the thread) of a decode step, and bytes after the first."""
    seconds, held_bytes = list[float](), 0
    ids = torch.tensor([prompt.context])
    with arm.following(model):
        cache = arm.read(model, ids).cache
        token = torch.tensor([prompt.continuation[:1]])
        for step in range(steps + WARMUP):
            at = torch.tensor([[ids.shape[1] + step]])
            started = time.thread_time()
            logits = model(input_ids=token, past_key_values=cache, position_ids=at).logits
            seconds.append(time.thread_time() - started)
            token = logits[:, -1:].argmax(-1)
            held_bytes = held_bytes or stored_bytes(cache)
    return statistics.median(seconds[WARMUP:]), held_bytes


def continued(model: Any, cache: Any, prompt: Prompt, every: int | None, start: int = 0) -> Tensor:
    """Logits `[T - 1 - start, V]` of the continuation, at most `every` tokens in a call."""
    end, logits = len(prompt.continuation) - 1, list[Tensor]()
    step = every or end
    while start < end:
        until = min((start // step + 1) * step, end)  # the first step may have begun already
        logits.append(_following(model, cache, prompt, start, until))
        start = until
    return torch.cat(logits)


def _following(model: Any, cache: Any, prompt: Prompt, start: int, end: int) -> Tensor:
    """Logits of the continuation's tokens from `start` to `end`, which the cache takes in."""
    at = torch.arange(start, end)[None] + len(prompt.context)
    ids = torch.tensor([prompt.continuation[start:end]])
    logits: Tensor = model(input_ids=ids, past_key_values=cache, position_ids=at).logits[0]
    return logits


def stored_bytes(cache: Any) -> int:
    """Bytes of every storage that the layers of a cache hold, each once, scales included.

    As a 16-bit model stores them: numbers that are wider because the model computes in 32 bits
    count two bytes.  What is packed counts as it is.
    """
    found = dict[int, int]()
    for tensor in _tensors(cache.layers):
        storage, wide = tensor.untyped_storage(), tensor.is_floating_point() and tensor.itemsize > 2
        found[storage.data_ptr()] = storage.nbytes() * 2 // (tensor.itemsize if wide else 2)
    return sum(found.values())


def _tensors(root: Any) -> Iterator[Tensor]:
    """Every plain tensor that can be reached from a value without entering a module."""
    todo, seen = [root], dict[int, Any]()  # what was seen is held, so that no id comes again
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, (str, type, torch.nn.Module)):
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            flatten = getattr(value, "__tensor_flatten__", None)
            if flatten is None:
                yield value
            else:
                todo += [getattr(value, name) for name in flatten()[0]]
        elif isinstance(value, (list, tuple, set, frozenset)):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
        else:
            todo += getattr(value, "__dict__", {}).values()
            for kind in type(value).__mro__:
                for name in getattr(kind, "__slots__", ()):
                    todo.append(getattr(value, name, None))
