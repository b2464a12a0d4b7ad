"""Values, sites and changes in words for people."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

from cacheplan.plans.codec import TAGS
from cacheplan.plans.rules import RANGES
from cacheplan.types import FeaturePlan, FeatureSite, WeightAction

LONGEST = 12  # items of a list that are all written out


def changes(a: object, b: object) -> Iterator[str]:
    """Ends of lines: ": old -> new", after ".field" where both have the same fields."""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        for field in dataclasses.fields(a):
            for change in changes(getattr(a, field.name), getattr(b, field.name)):
                yield f".{field.name}{change}"
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and _objects(a):
        for index, (old, new) in enumerate(zip(a, b, strict=True)):
            for change in changes(old, new):
                yield f"[{index}]{change}"
    elif a != b:
        yield f": {text(a)} -> {text(b)}"


def text(value: object) -> str:
    """A value in a few words; of a dataclass its tag and what differs from the defaults."""
    if value is None:
        return "none"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = TAGS.get(type(value), ("", ""))[1]
        parts = [
            f"{field.name} {text(item)}"
            for field in dataclasses.fields(value)
            if (item := getattr(value, field.name)) != field.default
        ]
        return " ".join([name, f"({', '.join(parts)})" if parts else ""]).strip() or "default"
    if isinstance(value, tuple):
        if _objects(value):
            return f"{len(value)} {type(value[0]).__name__.lower()}s"
        if len(value) > LONGEST:
            return f"[{text(value[0])}, ..., {text(value[-1])}] ({len(value)} items)"
        return f"[{', '.join(map(text, value))}]"
    return str(value)


def _objects(value: tuple[object, ...]) -> bool:
    return bool(value) and dataclasses.is_dataclass(value[0])


def plural(word: str, numbers: list[int]) -> str:
    """The word and its ascending numbers, such as "layers 0-2, 5" or "layer 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = (str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{word}{'s' if len(numbers) > 1 else ''} {', '.join(spans)}"


def site_words(site: FeatureSite) -> str:
    """A feature for people, such as "mlp of block 3", "delta of blocks 2-9" or "hidden"."""
    if site.part in ("hidden", "model"):
        return site.part
    many = site.part in RANGES  # others are parts of one block
    blocks = list(range(site.first, site.last if many else site.first + 1))
    return f"{site.part} of {plural('block', blocks)}"


def bit_words(action: WeightAction) -> str:
    """Bits of a linear layer's weights and activations, such as "W4A8"."""
    return f"W{action.weight.bits}A{action.activation.bits}"


def simulation_words(plan: FeaturePlan) -> str:
    """What people must know of a plan with few bits; empty for others."""
    if not plan.linears:
        return ""
    counts = Counter(bit_words(entry.action) for entry in plan.linears)
    layers = ", ".join(f"{number} {words}" for words, number in counts.items())
    return f"simulated in linear layers ({layers}): no time or memory is saved"
