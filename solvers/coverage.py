"""Choose a set that covers most: lazy greedy for monotone submodular functions."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np

from cacheplan.errors import InputError, ProfileError
from cacheplan.solvers.certify import relative_gap, verdict
from cacheplan.types.problem import Coverage, Solution


@dataclass(frozen=True)
class LazyGreedy:
    """`max f(S)` subject to `|S| <= size`: always the element of largest gain, ties to the first.

    Gains only shrink as the set grows, so a gain from an earlier round is an upper limit, and
    most need not be computed again (Minoux 1978).  Two bounds on the optimum are reported as the
    smaller: `f({}) + (f(S) - f({})) / (1 - (1 - 1/k)^k)`, whose factor is at least 1 - 1/e
    (Nemhauser, Wolsey and Fisher 1978), and `f(S)` plus the k largest gains that are left
    (the online bound of Leskovec et al. 2007).  Both need `f` monotone and submodular.
    """

    def __call__(self, problem: Coverage) -> Solution:
        if problem.items < 0 or problem.size < 0:
            raise InputError(
                f"Choosing {problem.size} of {problem.items} elements: expected two numbers of at "
                "least 0."
            )
        chosen: frozenset[int] = frozenset()
        empty = value = _finite(problem, chosen)
        # (-gain or its upper limit, element, size of the set the gain was computed for)
        heap = [(-math.inf, element, -1) for element in range(problem.items)]
        while len(chosen) < problem.size and heap:
            limit, element, computed_for = heapq.heappop(heap)
            if computed_for < len(chosen):
                gain = _finite(problem, chosen | {element}) - value
                heapq.heappush(heap, (-gain, element, len(chosen)))
            elif limit < 0:
                chosen |= {element}
                value = _finite(problem, chosen)
            else:
                break  # nothing left adds anything
        gains = sorted((_finite(problem, chosen | {e}) - value for _, e, _ in heap), reverse=True)
        k = min(problem.size, problem.items)
        rest = value + math.fsum(max(gain, 0.0) for gain in gains[:k])
        ratio = 1 - (1 - 1 / k) ** k if k else 1.0
        bound = max(value, min(rest, empty + (value - empty) / ratio))
        gap = relative_gap(value, bound)
        status = verdict(gap, "greedy choice, as gains only shrink")
        elements = np.array(sorted(chosen), dtype=np.int64)
        return Solution(elements, float(len(chosen)), value, bound, gap, status)


def _finite(problem: Coverage, elements: frozenset[int]) -> float:
    value = float(problem.value(elements))
    if not math.isfinite(value):
        raise ProfileError(
            f"The value of the set {sorted(elements)} is {value}, expected a finite number."
        )
    return value
