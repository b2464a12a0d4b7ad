"""`cacheplan recipes`: the methods that can be solved for."""

from __future__ import annotations

from cacheplan.cli.facts import action_words
from cacheplan.cli.options import Json
from cacheplan.cli.output import draw, emit, suggest
from cacheplan.cli.tables import recipes_table
from cacheplan.recipes import RECIPES


def recipes(as_json: Json = False) -> None:
    """List the recipes: their cells and papers.

    \b
    Example:
      cacheplan recipes
    """
    if as_json:
        emit(
            {
                "recipes": [
                    {
                        "name": recipe.name,
                        "summary": recipe.summary,
                        "paper": recipe.paper,
                        "allocation": recipe.allocation,
                        "candidates": [action_words(action) for action in recipe.candidates],
                        "decode_every": recipe.decode_every,
                        "family": recipe.family,
                    }
                    for recipe in RECIPES.values()
                ]
            }
        )
    else:
        draw(recipes_table(RECIPES))
    suggest("cacheplan solve --budget 0.2 --recipe snapkv")
