"""The commands on the embedded diffusion model, without any argument that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from cacheplan.cli import app


def cacheplan(command: str) -> Any:
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in command else result


@pytest.fixture(scope="module")
def _in_a_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("shapes"))
        yield


@pytest.mark.usefixtures("_in_a_folder")
def test_profile_solve_run_verify_compare() -> None:
    told = cacheplan("profile --family diffusion --steps 10 --guidance 2 --limit 1")
    assert told.stdout.startswith("profile.safetensors: shapes (PixArt")
    assert "10 steps, guidance 2" in told.stdout
    assert "Next: cacheplan solve --budget 0.4" in told.stderr
    for recipe in ("planned", "uniform"):
        cacheplan(f"solve --budget 0.5 --recipe {recipe} --out {recipe}.json")
    drawn = cacheplan("run --plan planned.json --json")
    assert (drawn["prompt"], drawn["seed"]) == ("one green star on grey", 20000)
    with Image.open("out.png") as picture:
        assert picture.size == (64, 64)
    found = cacheplan("compare planned.json uniform.json --limit 2 --json")["plans"]
    for result in found.values():
        assert result["counted_flops"] == result["planned_flops"]
    errors = {name: result["measured"]["error"] for name, result in found.items()}
    assert all(0 < error < 0.5 for error in errors.values())


def test_demo_keeps_its_files(tmp_path: Path) -> None:
    command = f"demo --family diffusion --limit 1 --budget 0.5 --dir {tmp_path} --json"
    told = cacheplan(command)["diffusion"]
    assert set(told["plans"]) == {"planned", "dpcache", "taylorseer", "uniform"}
    assert {"plan.json", "uniform.json", "out.png", "compare.png", "profile.safetensors"} <= {
        file.name for file in tmp_path.iterdir()
    }
