"""Few bits from a real profile of the embedded model to verified plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from cacheplan import api
from cacheplan.readings_bits import sums_checked
from cacheplan.recipes import RECIPES
from cacheplan.types import KVProfile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> KVProfile:
    out = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    found = api.profile(out=out, limit=4, ablate=1)
    assert isinstance(found, KVProfile)
    return found


def test_errors_of_tokens_and_bits_add_up(profile: KVProfile) -> None:
    found = sums_checked(profile)
    assert len(found) == len(profile.joint) == 4
    assert all(0.5 < ratio < 2 for _, ratio in found), "four prompts tell no more"


@pytest.mark.parametrize("recipe", ["joint", "int8", "int4", "kivi", "zipcache", "mikv", "kvtuner"])
def test_verified_bytes_of_few_bits_are_the_planned_ones(profile: KVProfile, recipe: str) -> None:
    found = api.verify(api.solve(profile, budget=0.5, recipe=recipe), limit=1)
    assert found.planned_bytes == found.measured_bytes <= 0.5 * found.full_bytes


def test_joint_beats_tokens_or_bits_alone(profile: KVProfile) -> None:
    kl = {
        name: api.verify(api.solve(profile, budget=0.2, recipe=name), limit=2).damage.kl
        for name in ("joint", "planned", "int4", "snapkv")
    }
    assert kl["joint"] <= min(kl["planned"], kl["int4"], kl["snapkv"])


def test_a_profile_may_leave_bits_out(tmp_path: Path) -> None:
    found = api.profile(out=tmp_path / "p.safetensors", limit=1, ablate=1, bits=False)
    assert isinstance(found, KVProfile)
    assert found.keys == found.values == ()
    assert found.joint == ()
    assert "key_damage" not in found.statistics
    assert RECIPES["planned"].candidates[0] in found.candidates
