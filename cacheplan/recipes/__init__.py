"""The table of methods: language models' KV caches and diffusion models' features."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TypeVar

from cacheplan.errors import InputError
from cacheplan.recipes.features import FEATURE_RECIPES
from cacheplan.recipes.kv import (
    CANDIDATES,
    RECIPES,
    candidates_for,
    costly,
    seeing,
    while_decoding,
)
from cacheplan.types import FeatureRecipe, KVRecipe

__all__ = [
    "CANDIDATES",
    "FEATURE_RECIPES",
    "RECIPES",
    "candidates_for",
    "find_feature_recipe",
    "find_recipe",
    "rows_to_measure",
    "seeing",
    "while_decoding",
]

R = TypeVar("R")


def find_recipe(name: str) -> KVRecipe:
    """Look a language model's recipe up; raises InputError naming the closest or all of them."""
    return _find(name, RECIPES, FEATURE_RECIPES, "diffusion")


def rows_to_measure(names: Sequence[str] | None) -> list[KVRecipe]:
    """The rows that a profile serves: planned and those named, or "all".

    None takes all but those that need passes of their own.  Raises InputError for unknown names.
    """
    if names is None:
        return [row for row in RECIPES.values() if not costly(row)]
    if list(names) == ["all"]:
        return list(RECIPES.values())
    return [find_recipe(name) for name in dict.fromkeys(["planned", *names])]


def find_feature_recipe(name: str) -> FeatureRecipe:
    """Look a diffusion model's recipe up; raises InputError naming the closest or all of them."""
    return _find(name, FEATURE_RECIPES, RECIPES, "language")


def _find(name: str, table: Mapping[str, R], others: Mapping[str, object], family: str) -> R:
    if name in table:
        return table[name]
    names = ", ".join(table)
    if name in others:
        raise InputError(f'The recipe "{name}" is for {family} models: choose one of {names}.')
    close = difflib.get_close_matches(name, table, n=1)
    hint = f'did you mean "{close[0]}"' if close else f"choose one of {names}"
    raise InputError(f'There is no recipe "{name}": {hint}.')
