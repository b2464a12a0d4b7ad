"""`cacheplan recipes`: the methods that can be solved for."""

from __future__ import annotations

from typing import Any

from cacheplan.cli.kv_facts import action_words, division_words
from cacheplan.cli.options import Json
from cacheplan.cli.output import draw, emit, suggest
from cacheplan.cli.tables import recipes_table
from cacheplan.plans.codec import encode
from cacheplan.recipes import FEATURE_RECIPES, RECIPES
from cacheplan.types import FeatureRecipe, KVRecipe, Recipe


def recipes(as_json: Json = False) -> None:
    """List the recipes of both families of models: their cells and papers.

    \b
    Example:
      cacheplan recipes
    """
    rows: list[Recipe] = [*RECIPES.values(), *FEATURE_RECIPES.values()]
    if as_json:
        emit({"recipes": [_facts(recipe) for recipe in rows]})
    else:
        draw(recipes_table(rows))
    suggest("cacheplan solve --budget 0.2 --recipe snapkv")


def _facts(recipe: Recipe) -> dict[str, Any]:
    if isinstance(recipe, KVRecipe):
        return {
            "name": recipe.name,
            "family": recipe.family,
            "summary": recipe.summary,
            "paper": recipe.paper,
            "allocation": division_words(recipe),
            "candidates": [action_words(action) for action in recipe.candidates],
            "decode_every": recipe.decode_every,
            "prefill_chunk": recipe.prefill_chunk,
            "online": recipe.online is not None,
        }
    facts: dict[str, Any] = encode(FeatureRecipe, recipe)
    return {"family": recipe.family, **facts}
