"""A published method as a row of orthogonal cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cacheplan.types.plan import KVAction


@dataclass(frozen=True, kw_only=True)
class KVRecipe:
    """Name, paper, and the cells it is made of.

    `allocation` decides how much each site keeps: "uniform", "prefix" (one threshold on
    retained attention mass, per layer) or "knapsack" (measured damage, per head).  `candidates`
    are what may be done at a site, as actions whose `keep` is still open (1.0); published
    methods have exactly one, and the knapsack chooses per site.
    """

    family: ClassVar[str] = "language"
    name: str
    summary: str
    paper: str
    allocation: str
    candidates: tuple[KVAction, ...]
    decode_every: int | None = None
