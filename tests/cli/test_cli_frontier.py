"""`cacheplan frontier`: the curve is that of `solve`, and what cannot be met is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cacheplan import api
from cacheplan.cli import app
from cacheplan.errors import ProfileError
from cacheplan.plans.check import kv_only
from cacheplan.recipes import RECIPES

run = CliRunner().invoke


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frontier") / "profile.safetensors"
    api.profile(None, out=path, limit=2, ablate=1)
    return path


def test_points_are_those_of_solve(profile: Path, tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    command = ["frontier", str(profile), "-r", "planned", "-r", "snapkv"]
    command += ["--budgets", "0.1,0.3,0.6", "--png", str(picture), "--json"]
    result = run(app, command)
    assert result.exit_code == 0, result.stderr
    points = json.loads(result.stdout)["points"]
    assert [(p["recipe"], p["budget"]) for p in points] == [
        (recipe, budget) for recipe in ("planned", "snapkv") for budget in (0.1, 0.3, 0.6)
    ]
    plan = kv_only(api.solve(api.load_profile(profile), budget=0.3), "test")
    assert plan.predicted is not None
    assert points[1]["damage"] == pytest.approx(plan.predicted.kl)
    assert points[1]["bound"] <= points[1]["damage"] * (1 + 1e-9)
    assert (np.diff([p["damage"] for p in points[:3]]) < 0).all(), "more cache, less damage"
    assert all(p["reached"] <= p["budget"] + 1e-9 for p in points)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_table_names_what_is_left_out(profile: Path) -> None:
    result = run(app, ["frontier", str(profile), "--budgets", "0.0001,0.5"])
    assert result.exit_code == 0
    assert "planned" in result.stdout
    assert "50.0 %" in result.stdout
    assert "planned at 0.0001 is left out" in result.stderr


def test_all_are_those_that_the_profile_knows(profile: Path) -> None:
    result = run(app, ["frontier", str(profile), "--recipe", "all", "--budgets", "0.3", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    solved = {point["recipe"] for point in found["points"]}
    assert {"planned", "joint", "snapkv", "cake", "int4"} <= solved
    left_out = {sentence.split()[0] for sentence in found["left_out"]}
    assert {"kvzip", "kvmerger"} <= left_out, "they need passes of their own"
    assert solved | left_out == set(RECIPES)
    alone = run(app, ["solve", str(profile), "--budget", "0.3", "--recipe", "kvzip"])
    assert alone.exit_code == ProfileError.exit_code
    assert "run `cacheplan profile` again with --recipe" in alone.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budgets", "0,0.5"], "not a share above 0"),
        (["--budgets", "half"], "are not numbers"),
        (["--budgets", "0.0001"], "No recipe meets any"),
        (["--recipe", "snapkw"], "snapkw"),
        (["--png", "curve.jpg"], ".png"),
    ],
)
def test_bad_input_gets_a_sentence(profile: Path, options: list[str], words: str) -> None:
    result = run(app, ["frontier", str(profile), *options])
    assert result.exit_code != 0
    assert words in result.stderr
    assert "Traceback" not in result.stderr
