"""The profile file: exact sums, shards, interruptions, and every way a file can lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cacheplan.errors import CacheplanError, InputError, ProfileError
from cacheplan.profilers.exact_sum import ExactSum
from cacheplan.profilers.settings import KVSettings
from cacheplan.profilers.store import (
    ProfileState,
    dumps,
    finish,
    merge,
    read_state,
    write_state,
)
from cacheplan.types import KVAction, LanguageSpec

PROMPTS = 7
numbers = st.floats(0, 60000, allow_nan=False)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(arrays(np.float64, 3, elements=numbers), min_size=1, max_size=8), st.randoms())
def test_exact_sums_do_not_depend_on_order(values: list[Any], shuffler: Any) -> None:
    def total(items: list[Any]) -> ExactSum:
        result = ExactSum.zeros((3,))
        for item in items:
            result.add(item, "x")
        return result

    forward, shuffled = total(values), list(values)
    shuffler.shuffle(shuffled)
    cut = shuffler.randint(0, len(values))
    halves = total(shuffled[:cut])
    halves.merge(total(shuffled[cut:]))
    assert np.array_equal(forward.parts, halves.parts)
    assert forward.count == halves.count
    np.testing.assert_allclose(forward.mean(), np.mean(values, axis=0), rtol=1e-12, atol=1e-17)
    np.testing.assert_allclose(
        forward.std(), np.std(values, axis=0), atol=1e-5 * (1 + np.max(np.abs(values)))
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_exact_sums_refuse_what_they_cannot_hold(bad: float) -> None:
    with pytest.raises(ProfileError, match='"damage"'):
        ExactSum.zeros((1,)).add(np.array([bad]), "damage")


def make_settings(tiny_spec: LanguageSpec, **changes: Any) -> KVSettings:
    fields: dict[str, Any] = {
        "model": tiny_spec,
        "candidates": (KVAction(keep=1.0),),
        "keeps": (0.5, 1.0),
        "probes": ((0, 0),),
        "ablate": 2,
        "prompts": PROMPTS,
        "prompts_digest": "sha256:0",
        "seed": 0,
        "versions": (("cacheplan", "0"),),
    }
    return KVSettings(**(fields | changes))


def found(index: int) -> dict[str, Any]:
    rng = np.random.default_rng(index)
    result = {"damage": rng.random((3, 2, 1, 2)) * 10.0 ** rng.integers(-9, 3)}
    if index < 2:
        result["ablation_kl"] = rng.random((3, 2, 1))
    return result


def measured(tiny_spec: LanguageSpec, indices: range, **changes: Any) -> ProfileState:
    state = ProfileState(make_settings(tiny_spec, **changes), indices)
    for index in indices:
        state.add(index, found(index))
    return state


def test_shards_merge_to_the_same_bytes(tiny_spec: LanguageSpec) -> None:
    whole = measured(tiny_spec, range(PROMPTS))
    shards = [measured(tiny_spec, range(i, PROMPTS, 3)) for i in (2, 0, 1)]
    assert dumps(merge(shards, ["a", "b", "c"])) == dumps(whole)


def test_file_round_trip_and_resume(tiny_spec: LanguageSpec, tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    write_state(measured(tiny_spec, range(3)), path)
    state = read_state(path)
    for index in range(3, PROMPTS):
        state.add(index, found(index))
    assert dumps(state) == dumps(measured(tiny_spec, range(PROMPTS)))
    profile = finish(state, "it")
    assert profile.statistics["damage"].count == PROMPTS
    assert profile.statistics["ablation_kl"].count == 2
    expected = np.mean([found(i)["damage"] for i in range(PROMPTS)], axis=0)
    np.testing.assert_allclose(profile.statistics["damage"].mean, expected, rtol=1e-12)


def test_incomplete_profiles_are_named(tiny_spec: LanguageSpec) -> None:
    with pytest.raises(ProfileError, match="lacks 4 of 7 prompts"):
        finish(measured(tiny_spec, range(3)), "half.safetensors")


def test_merging_strangers_or_twins_is_refused(tiny_spec: LanguageSpec) -> None:
    first = measured(tiny_spec, range(0, 4))
    with pytest.raises(InputError, match="prompts_digest"):
        merge([first, measured(tiny_spec, range(4, 7), prompts_digest="other")], ["a", "b"])
    with pytest.raises(InputError, match="repeats prompt 3"):
        merge([first, measured(tiny_spec, range(3, 7))], ["a", "b"])


def test_damaged_files_never_load(tiny_spec: LanguageSpec, tmp_path: Path) -> None:
    whole = dumps(measured(tiny_spec, range(PROMPTS)))
    path = tmp_path / "profile.safetensors"
    cuts = [whole[:n] for n in range(0, len(whole), 97)]
    others = [b"{}", b"\x00" * 64, whole + b"\x00", whole.replace(b'version\\":1', b'version\\":9')]
    for data in [*cuts, *others]:
        path.write_bytes(data)
        with pytest.raises(CacheplanError) as caught:
            read_state(path)
        assert "\n" not in str(caught.value)
        assert "cacheplan profile" in str(caught.value)


def test_negative_sums_are_refused(tiny_spec: LanguageSpec, tmp_path: Path) -> None:
    state = measured(tiny_spec, range(PROMPTS))
    state.sums["damage"].parts[0, 0, 0, 0, 0] = -5
    path = tmp_path / "profile.safetensors"
    write_state(state, path)
    with pytest.raises(ProfileError, match="negative"):
        read_state(path)


def test_header_is_canonical(tiny_spec: LanguageSpec) -> None:
    data = dumps(measured(tiny_spec, range(PROMPTS)))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = header["__metadata__"]["cacheplan"]
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
