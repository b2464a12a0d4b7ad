"""Profiles survive being killed, divided and repeated: always the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cacheplan import api
from cacheplan.errors import CacheplanError, InputError, ProfileError, UnsupportedError
from cacheplan.profilers.store import read_state
from cacheplan.recipes import RECIPES
from cacheplan.types import KVProfile

PROMPTS = 4


def run_profile(out: Path, **options: Any) -> Any:
    return api.profile(out=out, limit=PROMPTS, ablate=2, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "profile.safetensors"
    run_profile(path)
    assert not path.with_name(path.name + ".part").exists()
    return path.read_bytes()


def test_killed_and_started_again_gives_the_same_bytes(whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "profile.safetensors"
    part = out.with_name(out.name + ".part")
    script = (
        "from pathlib import Path; from cacheplan import api; "
        f"api.profile(out=Path({str(out)!r}), limit={PROMPTS}, ablate=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (part.exists() and read_state(part).done):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < len(read_state(part).done) < PROMPTS, "killed in the middle"
    assert not out.exists()
    run_profile(out)
    assert out.read_bytes() == whole
    assert not part.exists()


def test_two_shards_merge_to_the_same_bytes(whole: bytes, tmp_path: Path) -> None:
    shards = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for i, shard in enumerate(shards):
        assert run_profile(shard, shard=(i, 2)) is None
    with pytest.raises(ProfileError, match="lacks 2 of 4 prompts"):
        api.load_profile(shards[0])
    merged = api.merge(shards, out=tmp_path / "merged.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == whole
    assert merged.prompts == PROMPTS


def test_other_settings_do_not_resume(tmp_path: Path, whole: bytes) -> None:
    out = tmp_path / "profile.safetensors"
    out.with_name(out.name + ".part").write_bytes(whole)
    with pytest.raises(InputError, match="other settings"):
        api.profile(out=out, limit=PROMPTS + 1, ablate=2)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b"", "holds no prompts"),
        ("blank.jsonl", b"\n\n", "holds no prompts"),
        ("binary.txt", b"\xff\xfe\x00\x01", "not UTF-8 text"),
        ("zeros.txt", b"\0\0\0", "is binary"),
        ("short.txt", b"the river", "expected at least"),
        ("long.txt", b"river " * 3000, "the model reads 2048"),
        ("broken.jsonl", b'{"text": ', "line 1 is not JSON"),
        ("other.jsonl", b'{"prompt": "x"}', 'must be an object with "text"'),
        ("typed.jsonl", b'{"text": 3}', '"text" must be a string'),
        ("prompts.csv", b"a,b", 'has the ending ".csv"'),
        (
            "answers.jsonl",
            b'{"context": "'
            + b"the river was calm . " * 5
            + b'", "continuation": "a river", "answers": [[70, 80]]}',
            "no [start, end] range",
        ),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        api.profile(out=tmp_path / "profile.safetensors", prompts=path)
    assert sentence in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_plain_text_prompts_are_split(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("the river was calm . " * 20 + "\n\n" + "a bell rang twice . " * 20)
    profile = api.profile(out=tmp_path / "p.safetensors", prompts=path, split=0.75, ablate=1)
    assert profile is not None
    assert profile.prompts == 2
    assert float(profile.statistics["continuation_length"].mean) == pytest.approx(25, abs=1)


def test_missing_model_and_prompts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='"no/such-model" could not be loaded'):
        api.profile("no/such-model", out=tmp_path / "p.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        api.profile(out=tmp_path / "p.safetensors", prompts=tmp_path / "nothing.txt")
    with pytest.raises(InputError, match="expected i/n"):
        api.profile(out=tmp_path / "p.safetensors", shard=(2, 2))
    with pytest.raises(InputError, match="cannot write"):
        api.profile(out=tmp_path / "missing" / "p.safetensors", limit=1, ablate=1)


def test_unsupported_models_are_refused(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    from cacheplan.adapters.language import describe

    config = MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=16,
    )
    with pytest.raises(UnsupportedError, match="sliding_attention"):
        describe(MistralForCausalLM(config))


def test_only_what_recipes_need_is_measured(tmp_path: Path) -> None:
    """planned always; merged tokens and probes, which cost passes of their own, when asked for."""

    def measured(recipes: list[str] | None) -> KVProfile:
        found = api.profile(None, out=tmp_path / "p", limit=1, ablate=1, recipes=recipes)
        assert isinstance(found, KVProfile)
        return found

    few, usual, named = measured(["planned"]), measured(None), measured(["elastic"])
    assert set(few.candidates) == set(RECIPES["planned"].candidates)
    assert "format_damage" not in few.statistics
    assert set(few.candidates) < set(usual.candidates)
    assert not any(c.merge is not None for c in usual.candidates)
    assert set(named.candidates) == {*few.candidates, *RECIPES["elastic"].candidates}
    assert api.solve(few, budget=0.2).predicted is not None
    with pytest.raises(ProfileError, match="--recipe"):
        api.solve(few, budget=0.2, recipe="lagkv")
    with pytest.raises(CacheplanError, match="cacheplan profile"):
        api.solve(few, budget=0.2, recipe="joint")
    with pytest.raises(InputError, match="did you mean"):
        measured(["elastik"])
