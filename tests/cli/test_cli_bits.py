"""Precision in words, and the map of bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cacheplan.cli.bit_words import bit_map, bit_words, precision_words
from cacheplan.cli.kv_facts import action_words, cells
from cacheplan.recipes import RECIPES
from cacheplan.recipes.bits import FP8, K2_FINE, K4, V2, V4, by_token
from cacheplan.types import KVAction, Precision, Tier


def test_precisions_in_words() -> None:
    assert precision_words(Precision()) == "as they are"
    assert precision_words(FP8) == "fp8 per token"
    assert precision_words(K4) == "int4 per channel and 64 tokens"
    assert precision_words(by_token(2, separable=True)) == "int2 per token, channels scaled"


def test_actions_say_their_precision() -> None:
    plain = KVAction(keep=0.5)
    assert bit_words(plain) == []
    (kivi,) = RECIPES["kivi"].candidates
    assert "values int2 per token and 32 channels, the newest 32 exact" in action_words(kivi)
    (mikv,) = RECIPES["mikv"].candidates
    assert "the others' keys int2 per channel and 64 tokens" in action_words(mikv)
    assert "pairs of them where losers are demoted" in cells(RECIPES["joint"])


def test_map_of_bits(make_plan: Any) -> None:
    plain = KVAction(keep=0.5)
    assert list(bit_map(make_plan(plain))) == []
    few = replace(plain, key=K4, value=V2)
    low = replace(few, value=V4, losers="demote", low=Tier(key=K2_FINE, value=V2))
    plan = make_plan({0: plain, 1: few, (2, 0): low, (2, 1): plain})
    assert [line.split() for line in bit_map(plan)] == [
        ["0", "16/16", "16/16"],
        ["1", "4/2", "4/2"],
        ["2", "4/4>2/2", "16/16"],
    ]
