"""Frozen dataclasses to JSON values and back, strictly, driven by their type hints.

Known hints: `str`, `int`, `float`, `bool`, `None`, `tuple[T, ...]`, `tuple[A, B]`, keyword
dataclasses, and unions of these.  Dataclasses of a union are told apart by a tag, which is
written as their first field (`TAGS`).  Fields equal to their default are left out, so that new
optional fields do not change old files.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from cacheplan.errors import PlanError
from cacheplan.types import (
    SCORERS,
    BestScores,
    FeaturePlan,
    KVAction,
    KVPlan,
    Preference,
    WeightAction,
)

TAGS: dict[type, tuple[str, str]] = {
    KVPlan: ("family", KVPlan.family),
    FeaturePlan: ("family", FeaturePlan.family),
    KVAction: ("kind", "kv"),
    WeightAction: ("kind", "weight"),
    **{cls: ("name", name) for name, cls in SCORERS.items()},
    **{cls: ("name", cls.name) for cls in (Preference, BestScores)},
}
REPEATED = object()  # stands for the value of a key that an object of the file holds twice


def encode(hint: Any, value: object, path: str = "") -> Any:
    """The JSON value of `value`; PlanError, with the path, where it does not fit `hint`."""
    members = _members(hint)
    cls = type(value)
    if cls in members and dataclasses.is_dataclass(cls):
        return _encode_object(cls, value, path)
    sequence = _tuple_of(members)
    if sequence is not None and isinstance(value, tuple):
        return [encode(*item) for item in _items(sequence, value, path)]
    return _scalar(members, value, path)


def decode(hint: Any, value: object, path: str = "") -> Any:
    """The inverse of `encode` for parsed JSON; PlanError, with the path, for anything else."""
    members = _members(hint)
    classes: list[Any] = [member for member in members if dataclasses.is_dataclass(member)]
    if classes and isinstance(value, dict):
        return _decode_object(_select(classes, value, path), value, path)
    sequence = _tuple_of(members)
    if sequence is not None and isinstance(value, list):
        return tuple(decode(*item) for item in _items(sequence, value, path))
    return _scalar(members, value, path)


def show(value: object) -> str:
    """A value as a message quotes it: JSON on one line, cut where it gets long."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _encode_object(cls: type, value: object, path: str) -> dict[str, Any]:
    result: dict[str, Any] = dict([TAGS[cls]]) if cls in TAGS else {}
    for name, (hint, default) in _fields(cls).items():
        item = getattr(value, name)
        encoded = encode(hint, item, _join(path, name))  # first: it refuses False for 0
        if item != default:
            result[name] = encoded
    return result


def _decode_object(cls: type, value: dict[str, Any], path: str) -> Any:
    fields = _fields(cls)
    known = [TAGS[cls][0], *fields] if cls in TAGS else list(fields)
    for key in value:
        if key not in known:
            raise PlanError(
                f"{path or 'the file'} has the unknown field {show(key)}, expected "
                f"{', '.join(known)}; update cacheplan if the file is newer"
            )
    arguments = {}
    for name, (hint, default) in fields.items():
        if name in value:
            arguments[name] = decode(hint, value[name], _join(path, name))
        elif default is dataclasses.MISSING:
            raise PlanError(f"{_join(path, name)} is missing, expected {_expected(_members(hint))}")
    return cls(**arguments)


def _select(classes: list[type], value: dict[str, Any], path: str) -> type:
    """The dataclass that the tag in `value` names; the only one if it carries no tag."""
    if classes[0] not in TAGS:
        return classes[0]
    key = TAGS[classes[0]][0]
    words = {TAGS[cls][1]: cls for cls in classes}
    if key not in value:
        raise PlanError(f"{_join(path, key)} is missing, expected one of {', '.join(words)}")
    word = decode(str, value[key], _join(path, key))
    if word not in words:
        raise PlanError(
            f"{_join(path, key)} is {show(word)}, expected one of {', '.join(words)}; "
            "update cacheplan if the file is newer"
        )
    return words[word]


def _items(sequence: Any, values: Any, path: str) -> Iterator[tuple[Any, object, str]]:
    hints = get_args(sequence)
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(values)
    elif len(values) != len(hints):
        raise PlanError(f"{path} has {len(values)} items, expected {len(hints)}")
    for index, (hint, value) in enumerate(zip(hints, values, strict=True)):
        yield hint, value, f"{path}[{index}]"


def _scalar(members: tuple[Any, ...], value: object, path: str) -> Any:
    """`value` itself as exactly str, int, float, bool or None; int passes for float."""
    if value is REPEATED:
        raise PlanError(f"{path} appears twice in the same object, expected once")
    if value is None and NoneType in members:
        return None
    if isinstance(value, bool):  # before int, which bool is a kind of
        if bool in members:
            return value
    elif isinstance(value, str) and str in members:
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise PlanError(f"{path} is {show(value)}, expected text that UTF-8 can hold")
        return str(value)
    elif isinstance(value, int) and int in members:
        return int(value)
    elif isinstance(value, int | float) and float in members:
        if not abs(value) <= sys.float_info.max:  # NaN, Infinity, and integers beyond any float
            raise PlanError(f"{path} is {show(value)}, expected a finite number")
        return float(value) + 0.0  # -0.0 equals 0.0 and so must look like it
    raise PlanError(f"{path or 'the file'} is {show(value)}, expected {_expected(members)}")


def _expected(members: tuple[Any, ...]) -> str:
    words = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
    words |= {NoneType: "null"}
    names = (words.get(m, "a list" if get_origin(m) is tuple else "an object") for m in members)
    return " or ".join(dict.fromkeys(names))


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _tuple_of(members: tuple[Any, ...]) -> Any:
    return next((member for member in members if get_origin(member) is tuple), None)


@cache
def _fields(cls: type) -> dict[str, tuple[Any, Any]]:
    """Hint and default (MISSING if there is none) of each field, in the order of the file."""
    hints = get_type_hints(cls)
    return {
        field.name: (
            hints[field.name],
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory(),
        )
        for field in dataclasses.fields(cls)
    }


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
