"""The plans of the ablations lack what they say, and keep to the same budget."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.syspath_prepend(str(BENCHMARKS / "peers"))
        yield importlib.import_module


@settings(deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(0, 9, allow_nan=False), min_size=4, max_size=4), min_size=1, max_size=5
    ),
    kept=st.floats(0.1, 1.0),
)
def test_one_threshold_is_the_lowest_within_the_budget(
    module: Any, rows: list[list[float]], kept: float
) -> None:
    kv = module("ablations_kv")
    best, keeps = np.array(rows), np.array([0.1, 0.3, 0.6, 1.0])
    best[:, -1] = 0  # who keeps all loses nothing
    shares = kv.threshold(best, keeps, kept)
    falling = np.minimum.accumulate(best, axis=1)

    def mean(level: float) -> float:
        return float(np.mean([keeps[np.flatnonzero(row <= level)[0]] for row in falling]))

    levels = [level for level in np.unique(falling) if mean(level) <= kept + 1e-9]
    assert shares.mean() == pytest.approx(mean(min(levels)))


def test_runs_of_several_models_share_a_file(module: Any, tmp_path: Path) -> None:
    store, file = module("ablations").store, tmp_path / "runs.json"
    store(file, "one", {"rows": [1]})
    store(file, "two", {"rows": [2]})
    store(file, "one", {"rows": [3]})
    found = json.loads(file.read_text())["runs"]
    assert {name: run["rows"] for name, run in found.items()} == {"one": [3], "two": [2]}


def test_profiles_without_a_part_keep_the_rest(module: Any, synthetic_profiles: Any) -> None:
    features = module("ablations_features")
    profile = synthetic_profiles.build(steps=10, blocks=4)
    stepwise = features.whole_steps(profile)
    assert not features.tails(stepwise)
    for site in stepwise.sites:
        old, new = profile.sites.index(site), stepwise.sites.index(site)
        before, after = (p.statistics["gram"].mean for p in (profile, stepwise))
        assert np.array_equal(before[old], after[new])
    flat = module("cacheplan.schedules.tables").sensitivity(features.insensitive(profile))
    assert flat == pytest.approx(np.ones(profile.model.steps))
