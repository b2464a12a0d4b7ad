"""The commands as a user types them, with the embedded model and nothing replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cacheplan.cli import app


def cacheplan(command: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if "--json" in command else result


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a profile from two prompts."""
    folder = tmp_path_factory.mktemp("recall")
    cacheplan(f"profile --limit 2 --ablate 1 --out {folder}/profile.safetensors")
    return folder


@pytest.fixture
def folder(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the profile and nothing else."""
    (tmp_path / "profile.safetensors").write_bytes((measured / "profile.safetensors").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_profile_solve_run_verify_show(folder: Path) -> None:
    cacheplan("solve --budget 0.2")
    spoken = cacheplan("run --plan plan.json --max-new-tokens 8")
    told = cacheplan("run --plan plan.json --max-new-tokens 8 --json")
    assert spoken.stdout == told["text"] + "\n"
    assert told["measured_bytes"] == told["planned_bytes"] < told["full_bytes"]
    found = cacheplan("verify --limit 2 --write --json")
    assert found["measured_bytes"] == found["planned_bytes"] <= 0.2 * found["full_bytes"]
    assert 0 < found["measured"]["kl"] < 0.2
    shown = cacheplan("show --json")
    assert shown["measured"] == {k: v for k, v in found["measured"].items() if v is not None}
    assert "layer   0    1    2" in cacheplan("show").stdout


def test_a_profile_is_known_by_its_content(folder: Path) -> None:
    (folder / "measured").write_bytes((folder / "profile.safetensors").read_bytes())
    assert cacheplan("show measured").stdout.startswith("measured: recall")


def test_shards_merge_to_the_same_bytes(folder: Path) -> None:
    texts = ["the code of alice is amber . " * 8, "the river was calm . " * 9]
    (folder / "short.txt").write_text("\n\n".join(texts))
    for shard, out in (("0/1", "whole"), ("0/2", "a"), ("1/2", "b")):
        cacheplan(f"profile --prompts short.txt --ablate 1 --shard {shard} --out {out}")
    cacheplan("merge a b --out merged")
    assert (folder / "merged").read_bytes() == (folder / "whole").read_bytes()


def test_solving_again_changes_nothing_and_a_recipe_something(folder: Path) -> None:
    for out in ("a.json", "b.json"):
        cacheplan(f"solve --budget 0.3 --out {out}")
    assert (folder / "a.json").read_bytes() == (folder / "b.json").read_bytes()
    cacheplan("solve --budget 0.3 --recipe snapkv --out c.json")
    assert cacheplan("diff a.json b.json --json")["changes"] == []
    assert "recipe: planned -> snapkv" in cacheplan("diff a.json c.json --json")["changes"]


@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [
        ("solve --budget abc", 2, 'The budget "abc" is not understood'),
        ("solve --budget 0", 2, 'The budget "0" would keep 0 of the cache'),
        ("solve --budget 2", 2, 'The budget "2" would keep 2 of the cache'),
        ("solve --budget 1e-5", 6, "the smallest feasible budget"),
        ("solve --budget 0.2 --recipe snapkw", 2, 'did you mean "snapkv"'),
        ("solve --budget 0.2 --solver guess", 2, "choose one of"),
        ("solve none.safetensors --budget 0.2", 2, "run `cacheplan profile` first"),
        ("profile none", 2, 'The model "none" could not be loaded'),
        ("profile --shard 2/2", 2, 'The shard is "2/2"'),
        ("profile --prompts none.txt", 2, "none.txt cannot be read"),
    ],
)
def test_what_cannot_be_done(folder: Path, command: str, code: int, sentence: str) -> None:
    result = cacheplan(command, code)
    assert sentence in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert not (folder / "plan.json").exists()
