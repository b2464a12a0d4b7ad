"""Divide a plan's tokens among layers while a prompt is read (CAKE, arXiv 2503.12491)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import ref

from cacheplan.plans.rows import kept_rows, protected_tokens
from cacheplan.types import KVPlan

if TYPE_CHECKING:
    from cacheplan.runtime.layer import PlanLayer


class Cascade:
    """The layers that have read the prompt so far, and the tokens of each.

    Every layer has its protected tokens beforehand; what the plan keeps beyond those is divided
    among the layers that have arrived, in proportion to their preferences, so that each gives some
    up with every further layer.  What the last one leaves is what a division among all at once
    gives, since parts never grow when another layer comes (`divide`).
    """

    def __init__(self, plan: KVPlan) -> None:
        self._plan = plan
        self._protected = protected_tokens(plan)
        # weak: a layer knows the cascade, and no cycle may keep a cache alive
        self._layers: list[ref[PlanLayer]] = []
        self._preferences: list[list[float]] = []  # of each batch entry

    def arrived(self, layer: PlanLayer, preferences: list[float], lengths: list[int]) -> None:
        """Cut all layers that have arrived back to their parts, now that one more has."""
        self._layers.append(ref(layer))
        self._preferences.append(preferences)
        parts = [
            self._parts([own[b] for own in self._preferences], length)
            for b, length in enumerate(lengths)
        ]
        last = len(self._layers) == len(self._plan.model.planned)
        heads = self._plan.model.kv_heads
        for m, known in enumerate(self._layers):
            earlier = known()
            assert earlier is not None
            earlier.cut_back([own[m] for own in parts for _ in range(heads)], last=last)
        if last:
            self.clear()

    def clear(self) -> None:
        self._layers, self._preferences = [], []

    def _parts(self, preferences: list[float], length: int) -> list[int]:
        """Tokens per head of each layer that has arrived, of a text of that length."""
        planned = self._plan.model.planned
        total = int(kept_rows(self._plan, length)[list(planned), 0].sum())
        first = min(self._protected, total // len(planned))
        spare = divide(preferences, total - first * len(planned), length - first)
        return [first + part for part in spare]


def divide(weights: Sequence[float], total: int, most: int) -> list[int]:
    """Divide `total` in proportion to the weights, at most `most` each: integers of exact sum.

    Webster's rule: a common divisor, and rounding.  Unlike largest remainders it takes nothing
    away from one and gives it to another when a further weight comes in, so no part ever grows.
    Ties go to the earlier; weights below 1e-30 count alike.
    """
    total = min(total, most * len(weights))
    weights = [max(weight, 1e-30) for weight in weights]

    def parts(logarithm: float) -> list[int]:
        divisor = math.exp(logarithm)
        return [min(most, math.floor(weight / divisor + 0.5)) for weight in weights]

    low = math.log(min(weights)) - math.log(most + 1.0)  # everyone has most
    high = math.log(max(weights)) + 1.0  # nobody has anything
    for _ in range(64):
        middle = (low + high) / 2
        if sum(parts(middle)) >= total:
            low = middle
        else:
            high = middle
    found = parts(high)
    claims = [
        (-weights[i] / (part + 0.5), i)
        for i, most_of_it in enumerate(parts(low))
        for part in range(found[i], most_of_it)
    ]
    for _, i in sorted(claims)[: total - sum(found)]:
        found[i] += 1
    return found
