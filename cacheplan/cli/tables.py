"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cacheplan.cli import feature_facts
from cacheplan.cli.kv_facts import cells, statistic
from cacheplan.cli.numbers import ABSENT, interval, number, percent, size
from cacheplan.types import KVPlan, KVProfile, KVRecipe, Recipe

if TYPE_CHECKING:
    from cacheplan.verification import Verification

SHOWN_KEEPS = (0.05, 0.1, 0.2, 0.5)


def table_of(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def recipes_table(recipes: Iterable[Recipe]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("family", no_wrap=True)
    table.add_column("cells", ratio=3)
    table.add_column("paper", ratio=2)
    for recipe in recipes:
        words = cells(recipe) if isinstance(recipe, KVRecipe) else feature_facts.cells(recipe)
        table.add_row(recipe.name, recipe.family, words, recipe.paper)
    return table


def verification_table(plan: KVPlan, found: Verification) -> Table:
    """Predicted beside measured beside the full cache."""
    table = table_of("", "predicted", "measured", "full cache")
    damage, predicted = found.damage, plan.predicted
    table.add_row("KL", number(predicted.kl if predicted else None), number(damage.kl), "0")
    table.add_row("same top token", ABSENT, percent(damage.agreement), percent(1.0))
    table.add_row("recall", ABSENT, percent(damage.recall), percent(damage.full_recall))
    table.add_row("NLL", ABSENT, number(damage.nll), number(damage.full_nll))
    held = (found.planned_bytes, found.measured_bytes, found.full_bytes)
    table.add_row("cache", *map(size, held))
    return table


def comparison_table(found: Mapping[str, Verification]) -> Table:
    """One row per recipe, and first the full cache they are compared with."""
    table = table_of("", "KL", "95 % interval", "same top token", "recall", "cache", "of full")
    first = next(iter(found.values()))
    full, recall = first.full_bytes, percent(first.damage.full_recall)
    table.add_row("full cache", "0", ABSENT, percent(1.0), recall, size(full), percent(1.0))
    for name, result in found.items():
        held, damage = result.measured_bytes, result.damage
        table.add_row(
            name,
            number(damage.kl),
            interval(result.kl_per_prompt),
            percent(damage.agreement),
            percent(damage.recall),
            size(held),
            percent(held / full),
        )
    return table


def damage_table(profile: KVProfile, names: Iterable[str]) -> Table:
    """Mean damage over all heads for each candidate (`names`) at a few keep fractions."""
    columns = sorted({_closest(profile.keeps, keep) for keep in SHOWN_KEEPS})
    table = table_of("damage when keeping", *(f"{100 * profile.keeps[g]:g} %" for g in columns))
    means = statistic(profile, "damage").mean((0, 1))  # [A, G]
    for name, row in zip(names, means, strict=True):
        table.add_row(name, *(number(float(row[g])) for g in columns))
    return table


def _closest(keeps: tuple[float, ...], wanted: float) -> int:
    return min(range(len(keeps)), key=lambda g: abs(keeps[g] - wanted))
