"""Two classes of sites against every way to divide them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.errors import InfeasibleError, InputError, ProfileError
from cacheplan.solvers.brute import Brute
from cacheplan.solvers.classes import Classes
from cacheplan.types import TwoClasses


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(0, 2**31), st.floats(0, 0.8))
def test_classes_are_the_best_of_all_divisions(sites: int, seed: int, forbidden: float) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 9, (sites, sites + 1)).astype(float)  # ties included
    cost[:, 1:][:, rng.random(sites) < forbidden] = np.inf
    found = Classes()(TwoClasses(cost))
    best = Brute()(TwoClasses(cost)).value
    assert found.value == found.bound == best
    number = int(found.choice.sum())
    assert found.rate == number
    assert np.isfinite(cost[:, number]).all()
    assert cost[found.choice == 0, number].sum() == best


def test_unusable_costs() -> None:
    with pytest.raises(InfeasibleError):
        Classes()(TwoClasses(np.full((2, 3), np.inf)))
    with pytest.raises(ProfileError):
        Classes()(TwoClasses(np.full((2, 3), np.nan)))
    with pytest.raises(InputError):
        Classes()(TwoClasses(np.zeros((2, 2))))
