"""`cacheplan show --device`: what every operation runs, and why."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from cacheplan.cli.app import app
from cacheplan.kernels import paths


def run(*words: str) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, ["show", *words])
    return found.exit_code, found.stdout, found.stderr


def test_a_cpu_says_why_it_runs_no_triton() -> None:
    code, shown, _ = run("--device", "cpu")
    assert code == 0
    for row in paths.paths("cpu"):
        line = next(line for line in shown.splitlines() if row.name in line)
        assert row.implementation in line
        assert row.why in line
    assert "Triton's kernels need a CUDA device" in shown


def test_json_is_the_same_table() -> None:
    code, shown, _ = run("--device", "auto", "--json")
    found = json.loads(shown)
    assert code == 0
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["operations"] == [vars(row) for row in paths.paths(found["device"])]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named() -> None:
    for name in ("cuda", "abacus"):
        code, _, said = run("--device", name)
        assert code == 2
        assert said == f'Error: torch finds no device "{name}" here: name another, such as "cpu".\n'


def test_a_file_and_a_device_are_too_much() -> None:
    code, _, said = run("plan.json", "--device", "cpu")
    assert code == 2
    assert "leave the file out" in said
