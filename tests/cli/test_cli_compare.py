"""`cacheplan compare` of recipes: solved as `solve` does, measured as `verify` does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cacheplan import api
from cacheplan.cli import app
from cacheplan.intervals import mean_interval
from cacheplan.plans.check import kv_only

run = CliRunner().invoke


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare")
    profile = api.profile(None, out=path / "profile.safetensors", limit=2, ablate=1)
    assert profile is not None
    api.save_plan(api.solve(profile, budget=0.3, recipe="keydiff"), path / "mine.json")
    return path


def test_recipes_are_solved_and_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    command = "compare mine.json -r planned -r snapkv --budgets 0.2,0.5 --limit 2 --png c.png"
    found = json.loads(run(app, [*command.split(), "--json"]).stdout)["plans"]
    labels = [f"{name} at {budget}" for name in ("planned", "snapkv") for budget in (0.2, 0.5)]
    assert list(found) == ["mine", *labels]
    assert (folder / "c.png").read_bytes()[:4] == b"\x89PNG"
    plan = kv_only(api.solve(api.load_profile(Path("profile.safetensors")), budget=0.2), "test")
    alone = api.verify(plan, limit=2)
    told = found["planned at 0.2"]
    assert told["measured"]["kl"] == alone.damage.kl
    assert told["kl_per_prompt"] == list(alone.kl_per_prompt)
    assert told["measured_bytes"] == alone.measured_bytes == told["planned_bytes"]
    assert told["interval"][0] <= alone.damage.kl <= told["interval"][1]
    assert found["mine"]["recipe"] == "keydiff"


def test_budgets_are_columns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    shown = run(app, "compare -r snapkv -r int4 --budgets 0.0001,0.2,0.5 --limit 1".split())
    assert "snapkv at 0.0001 is left out" in shown.stderr
    heading, row = (
        next(line.split() for line in shown.stdout.splitlines() if line.startswith(start))
        for start in ("KL, recall", "snapkv  ")
    )
    assert heading[-2:] == ["0.2", "0.5"]
    assert len(row) == 1 + 2 * 3  # damage, recall, %
    assert "full cache" in shown.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("compare", "Nothing was named to compare"),
        ("compare mine.json --budgets 0.2", "--budgets is for recipes"),
        ("compare mine.json --profile profile.safetensors", "--profile is for recipes"),
        ("compare -r snapkw", 'did you mean "snapkv"'),
        ("compare -r snapkv --budgets 2", "not a share above 0"),
        ("compare -r snapkv --png a.jpg", "curves are written as .png"),
        ("compare -r snapkv --profile absent.safetensors", "absent.safetensors"),
        ("compare -r snapkv -o a.png", "--out does not fit"),
    ],
)
def test_bad_input(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, words: str) -> None:
    monkeypatch.chdir(folder)
    result = run(app, command.split())
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


def test_an_interval_holds_the_mean_and_narrows() -> None:
    few, many = [0.1, 0.4, 0.2], [0.1, 0.4, 0.2] * 20
    low, high = mean_interval(few)
    assert 0.1 - 1e-9 <= low < sum(few) / 3 < high <= 0.4 + 1e-9
    inner = mean_interval(many)
    assert low < inner[0] < inner[1] < high
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5)
