"""Improve a choice by moving two sites at a time."""

from __future__ import annotations

import numpy as np

from cacheplan.solvers.certify import picked
from cacheplan.types.problem import Floats, Integers, Knapsack

_MOVES = 256  # the candidates of one round: pairs are tried all with all
_ROUNDS = 200
_WORTH = 1e-12  # relative; smaller gains may be rounding


def improve(problem: Knapsack, choice: Integers, reduced: Floats) -> Integers:
    """The best pair of moves, again and again, until no pair lowers the distortion.

    Candidates are the options of smallest `reduced` cost `[sites, options]`; one move alone is a
    pair with none.  A choice above the budget first takes the pair that returns below it at the
    least distortion, and is given back as it is where no pair does.
    """
    options = reduced.shape[1]
    nearest = np.argsort(reduced, axis=None, kind="stable")
    site, option = nearest // options, nearest % options
    for _ in range(_ROUNDS):
        moves = np.flatnonzero(choice[site] != option)[:_MOVES]
        to, new = site[moves], option[moves]
        old = choice[to]
        added = np.append(problem.rate[to, new] - problem.rate[to, old], 0.0)
        saved = np.append(problem.distortion[to, old] - problem.distortion[to, new], 0.0)
        mover = np.append(to, -1)  # the last move is none
        slack = problem.budget - picked(problem.rate, choice)
        allowed = (added[:, None] + added <= slack) & (mover[:, None] != mover)
        gain = np.where(allowed, saved[:, None] + saved, -np.inf)
        first, second = divmod(int(gain.argmax()), len(mover))
        best = gain[first, second]
        worth = _WORTH * picked(problem.distortion, choice)
        if best == -np.inf or (slack >= 0 and best <= worth):
            break
        choice = choice.copy()
        for move in {first, second} - {len(moves)}:
            choice[to[move]] = new[move]
    return choice
