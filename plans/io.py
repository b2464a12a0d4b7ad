"""Plans as files: canonical JSON out, only unchanged canonical JSON in.  See SPEC.md."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from cacheplan.atomic import atomic_write
from cacheplan.errors import InputError, PlanError
from cacheplan.plans.check import check
from cacheplan.plans.codec import REPEATED, decode, encode, show
from cacheplan.types import Plan

FORMAT = "cacheplan"
VERSION = 1
LARGEST = 64 * 2**20  # bytes; a plan of a thousand heads takes a hundred thousand


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in the file at `path`.

    Raises InputError if the file cannot be read and PlanError if it is not a valid plan.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except FileNotFoundError as error:
        raise InputError(f"there is no plan at {path}; write one with `cacheplan solve`") from error
    except OSError as error:
        raise InputError(
            f"cannot read {path} ({error.strerror or error}); "
            "give a plan file written by `cacheplan solve`"
        ) from error
    return loads(data, str(path))


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write `plan` to `path`, whole or not at all; PlanError, InputError."""
    atomic_write(path, dumps(plan))


def loads(data: bytes, name: str) -> Plan:
    """The plan in `data`; PlanError starts with `name` and tells the first thing wrong."""
    try:
        content = _parse(data)
        plan: Plan = decode(Plan, content)
        if not _same(data, _file(plan)):
            raise PlanError(
                "the file was changed after it was written, its digest no longer fits; solve again"
            )
        check(plan)
    except PlanError as error:
        raise PlanError(f"{name}: {error}") from None
    return plan


def dumps(plan: Plan) -> bytes:
    """The canonical file: equal plans give identical bytes; PlanError if `check` refuses it."""
    data = _file(plan)  # first: it also checks types, which `check` takes as right
    check(plan)
    return data


def digest(plan: Plan) -> str:
    """SHA-256 of the canonical file without its digest line, as "sha256:<hexadecimal>"."""
    return _digest(encode(Plan, plan))


def _digest(content: dict[str, Any]) -> str:
    text = _layout({"format": FORMAT, "version": VERSION, **content})
    return "sha256:" + hashlib.sha256(text).hexdigest()


def _file(plan: Plan) -> bytes:
    content = encode(Plan, plan)
    head = {"format": FORMAT, "version": VERSION, "digest": _digest(content)}
    return _layout({**head, **content})


def _layout(content: dict[str, Any]) -> bytes:
    """One line per field of the file and of its objects, one per entry: plans diff well."""
    lines = ",\n".join(f"  {_line(key)}: {_block(value)}" for key, value in content.items())
    return f"{{\n{lines}\n}}\n".encode()


def _block(value: Any) -> str:
    """A field of the file: an object has a line for each of its fields."""
    if isinstance(value, dict) and value:
        lines = ",\n".join(
            f"    {_line(key)}: {_rows(item, '    ')}" for key, item in value.items()
        )
        return f"{{\n{lines}\n  }}"
    return _rows(value, "  ")


def _rows(value: Any, indent: str) -> str:
    """A list of objects has a line for each of them; everything else is one line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        lines = ",\n".join(f"{indent}  {_line(item)}" for item in value)
        return f"[\n{lines}\n{indent}]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _same(data: bytes, canonical: bytes) -> bool:
    """Equal but for white space, so line ends and indentation may be converted.

    Comparing the text and not only the digest also refuses a number spelled otherwise, such as
    a last digit that no float can tell.  White space inside a string is covered by the digest.
    """
    return b"".join(data.split()) == b"".join(canonical.split())


def _parse(data: bytes) -> dict[str, Any]:
    """The file's fields without format, version and digest."""
    if len(data) > LARGEST:
        raise PlanError("the file is larger than 64 MiB, expected a plan; check the path")
    if not data.strip():
        raise PlanError("the file is empty, expected a plan; solve again")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise PlanError(
            f"the file is not text (byte {data[error.start]:#04x} at {error.start}), "
            "expected a plan; if it is a profile, run `cacheplan solve` on it"
        ) from None
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        body = text.rstrip()
        if body.startswith("{") and (error.pos >= len(body) or not body.endswith("}")):
            raise PlanError(
                f"the file ends in the middle (line {body.count(chr(10)) + 1}), "
                "expected a whole plan; copy it again or solve again"
            ) from None
        raise PlanError(
            f"the file is not JSON (line {error.lineno}, column {error.colno}: {error.msg}), "
            "expected a plan; check the path or solve again"
        ) from None
    except (ValueError, RecursionError):
        raise PlanError(
            "the file holds a number too long or lists too deep for a plan; solve again"
        ) from None
    if not isinstance(content, dict) or "format" not in content:
        raise PlanError("the file is JSON without a format, expected a plan; check the path")
    kind = decode(str, content.pop("format"), "format")
    if kind != FORMAT:
        raise PlanError(f"format is {show(kind)}, expected {show(FORMAT)}; check the path")
    version = decode(int | None, content.pop("version", None), "version")
    if version != VERSION:
        raise PlanError(
            f"version is {show(version)}, expected {VERSION}; update cacheplan or solve again"
        )
    decode(str, content.pop("digest", None), "digest")  # its value is compared with the rest
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        result[key] = REPEATED if key in result else value
    return result
