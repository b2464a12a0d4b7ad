"""What changed between two plans, in lines for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from cacheplan.plans.codec import TAGS
from cacheplan.types import Entry, Plan

PARTS = ("model", "recipe", "budget", "trigger", "predicted", "measured", "certificate")
WHOLE = -1  # stands for the head of a feature or weight that has none


def diff(a: Plan, b: Plan) -> list[str]:
    """One line per change from `a` to `b`, provenance aside.

    Heads of a layer that change alike share a line, and so do layers whose heads do:
    "layers 0-3, 7, head 1: keep 0.2 -> 0.3".
    """
    lines = []
    for part in PARTS:
        lines += [f"{part}{change}" for change in _changes(getattr(a, part), getattr(b, part))]
    return lines + _site_lines(a, b)


def _changes(a: object, b: object) -> Iterator[str]:
    """Ends of lines: ": old -> new", after ".field" where both have the same fields."""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        for field in dataclasses.fields(a):
            for change in _changes(getattr(a, field.name), getattr(b, field.name)):
                yield f".{field.name}{change}"
    elif a != b:
        yield f": {_text(a)} -> {_text(b)}"


def _site_lines(a: Plan, b: Plan) -> list[str]:
    before, after = _decisions(a), _decisions(b)
    heads: dict[tuple[int, str, str], list[int]] = {}  # by layer, what, change
    for place in sorted(before.keys() | after.keys()):
        layer, what, head = place
        if change := _change(before.get(place), after.get(place)):
            heads.setdefault((layer, what, change), []).append(head)
    everyone = list(range(max(a.model.kv_heads, b.model.kv_heads)))
    layers: dict[str, list[int]] = {}  # by the rest of the line
    for (layer, what, change), found in heads.items():
        who = "" if found == [WHOLE] else ", all heads"
        if found not in ([WHOLE], everyone):
            who = f", {_plural('head', found)}"
        layers.setdefault(f"{what}{who}: {change}", []).append(layer)
    return [f"{_plural('layer', found)}{rest}" for rest, found in layers.items()]


def _decisions(plan: Plan) -> dict[tuple[int, str, int], dict[str, str]]:
    """Fields of the action by (layer, what, head); heads decided together come one by one."""
    result = {}
    for entry in plan.entries:
        site, facts = entry.site, _facts(entry)
        what = "" if site.target == "kv" else f", {site.target}"
        what += "" if site.step is None else f" at step {site.step}"
        heads = [WHOLE] if site.head is None else [site.head]
        if site.target == "kv" and site.head is None:
            heads = list(range(plan.model.kv_heads))
        for head in heads:
            result[site.layer, what, head] = facts
    return result


def _facts(entry: Entry) -> dict[str, str]:
    action = entry.action
    facts = {field.name: _text(getattr(action, field.name)) for field in dataclasses.fields(action)}
    if entry.site.target == "kv":
        facts["heads"] = "together" if entry.site.head is None else "apart"
    return facts


def _change(before: dict[str, str] | None, after: dict[str, str] | None) -> str:
    if before is None:
        return "only in the second plan"
    if after is None:
        return "only in the first plan"
    return ", ".join(f"{k} {before[k]} -> {after[k]}" for k in before if before[k] != after[k])


def _text(value: object) -> str:
    """A value in a few words; of a dataclass its tag and what differs from the defaults."""
    if value is None:
        return "none"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = TAGS.get(type(value), ("", ""))[1]
        parts = [
            f"{field.name} {_text(item)}"
            for field in dataclasses.fields(value)
            if (item := getattr(value, field.name)) != field.default
        ]
        return " ".join([name, f"({', '.join(parts)})" if parts else ""]).strip() or "default"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)


def _plural(word: str, numbers: list[int]) -> str:
    """The word and its ascending numbers, such as "layers 0-2, 5" or "layer 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{word}{'s' if len(numbers) > 1 else ''} {text}"
