from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from cacheplan.errors import PlanError
from cacheplan.plans.codec import REPEATED, decode, encode
from cacheplan.types import (
    Action,
    Entry,
    KVAction,
    Random,
    Site,
    Trigger,
    WeightAction,
    WindowAttention,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    count: int
    ratio: float = 0.5
    flag: bool = False
    note: str | None = None
    names: tuple[str, ...] = ()
    pair: tuple[str, int] = ("a", 1)


def test_fields_equal_to_their_default_are_left_out() -> None:
    assert encode(Sample, Sample(count=0)) == {"count": 0}
    assert encode(Sample, Sample(count=0, note="", ratio=1)) == {
        "count": 0,
        "ratio": 1.0,
        "note": "",
    }
    assert decode(Sample, {"count": 3}) == Sample(count=3)


def test_tags_tell_the_members_of_a_union_apart() -> None:
    actions: tuple[Action, ...] = (
        KVAction(keep=0.5, scorer=Random(seed=7)),
        WeightAction(),
    )
    encoded = encode(tuple[Action, ...], actions)
    assert encoded == [
        {"kind": "kv", "keep": 0.5, "scorer": {"name": "random", "seed": 7}},
        {"kind": "weight"},
    ]
    assert decode(tuple[Action, ...], encoded) == actions


def test_an_integer_passes_for_a_float_and_becomes_one() -> None:
    assert repr(decode(float, 1)) == "1.0"
    assert repr(encode(float, -0.0)) == "0.0"
    assert json.dumps(encode(float, np.float64(0.1))) == "0.1"


@pytest.mark.parametrize(
    ("hint", "value", "sentence"),
    [
        (int, True, "x is true, expected an integer"),
        (int, 1.0, "x is 1.0, expected an integer"),
        (int, None, "x is null, expected an integer"),
        (int | None, "1", 'x is "1", expected an integer or null'),
        (float, "a", 'x is "a", expected a number'),
        (float, False, "x is false, expected a number"),
        (float, float("nan"), "x is NaN, expected a finite number"),
        (float, float("-inf"), "x is -Infinity, expected a finite number"),
        (float, 10**400, f"x is {'1' + '0' * 56}..., expected a finite number"),
        (bool, 0, "x is 0, expected true or false"),
        (str, 1, "x is 1, expected text"),
        (str, "\ud800", 'x is "\\ud800", expected text that UTF-8 can hold'),
        (str, REPEATED, "x appears twice in the same object, expected once"),
        (tuple[int, ...], {}, "x is {}, expected a list"),
        (tuple[int, ...], [1, "b"], 'x[1] is "b", expected an integer'),
        (tuple[str, int], ["a"], "x has 1 items, expected 2"),
        (Trigger, [], "x is [], expected an object"),
        (Sample, {}, "x.count is missing, expected an integer"),
        (
            Trigger,
            {"every": 1},
            'x has the unknown field "every", expected decode_every, prefill_chunk, online; '
            "update cacheplan if the file is newer",
        ),
        (Action, {}, "x.kind is missing, expected one of kv, weight"),
        (
            Action,
            {"kind": "KV"},
            'x.kind is "KV", expected one of kv, weight; update cacheplan if the file is newer',
        ),
        (Action, {"kind": ["kv"]}, 'x.kind is ["kv"], expected text'),
        (Action, {"kind": REPEATED}, "x.kind appears twice in the same object, expected once"),
        (Action, {"kind": "kv", "keep": 1, "kind2": 1}, 'x has the unknown field "kind2"'),
        (
            Entry,
            {"site": {"layer": 0}, "action": {"kind": "kv", "keep": "a"}},
            'x.action.keep is "a", expected a number',
        ),
    ],
)
def test_decode_refuses(hint: Any, value: object, sentence: str) -> None:
    with pytest.raises(PlanError) as caught:
        decode(hint, value, "x")
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (Entry(site=Site(layer=0), action=KVAction(keep=float("nan"))), "action.keep is NaN"),
        (Entry(site=Site(layer=np.int64(0)), action=KVAction(keep=1)), "site.layer is "),  # type: ignore[arg-type]
        (Entry(site=Site(layer=0), action=KVAction(keep=1, sinks=False)), "action.sinks is false"),
        (Entry(site=Site(layer=0), action=WindowAttention()), "action is "),  # type: ignore[arg-type]
    ],
)
def test_encode_refuses_what_decode_would(value: Entry, sentence: str) -> None:
    with pytest.raises(PlanError) as caught:
        encode(Entry, value)
    assert str(caught.value).startswith(sentence)
