"""Every error is one sentence on stderr and an exit code; stdout stays empty."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cacheplan import api
from cacheplan.cli import app
from cacheplan.errors import (
    CacheplanError,
    InfeasibleError,
    InputError,
    ModelMismatchError,
    PlanError,
    ProfileError,
    UnsupportedError,
)

GOLDEN = Path(__file__).parents[1] / "plans" / "golden_plan.json"
run = CliRunner().invoke


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copy(GOLDEN, tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ("solve", 2, "Missing option '--budget'"),
        ("profile --shard 2", 2, '"2" is not of the form i/n, such as 0/4.'),
        ("profile --limit many", 2, "Invalid value for '--limit'"),
        ("run --max-new-tokens 0", 2, "Invalid value for '--max-new-tokens'"),
        ("run --prompt a --prompt-file b", 2, "Both --prompt and --prompt-file are given"),
        ("run --prompt-file no.txt", 2, "no.txt cannot be read (No such file or directory)"),
        ("run --prompt-file latin.txt", 2, "latin.txt is not UTF-8 text (byte 1)"),
        ("run --plan no.json", 2, "there is no plan at no.json"),
        ("verify no.json", 2, "there is no plan at no.json"),
        ("verify broken.json", 3, "broken.json: the file"),
        ("show no.json", 2, "there is no plan at no.json"),
        ("diff plan.json no.json", 2, "there is no plan at no.json"),
        ("demo --dir plan.json", 2, "plan.json cannot be made a folder"),
        ("plot", 2, "No such command 'plot'"),
        ("--nonsense", 2, "No such option"),
    ],
)
def test_what_the_user_gets_wrong(arguments: str, code: int, sentence: str) -> None:
    Path("latin.txt").write_bytes(b"a\xe9")
    Path("broken.json").write_text("{")
    result = run(app, arguments.split())
    assert result.exit_code == code
    assert sentence in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        CacheplanError("Nothing works."),
        InputError("No."),
        PlanError("No."),
        ProfileError("No."),
        ModelMismatchError("No."),
        UnsupportedError("No."),
        InfeasibleError("No."),
    ],
)
def test_errors_of_the_api_keep_their_codes(
    monkeypatch: pytest.MonkeyPatch, error: CacheplanError
) -> None:
    monkeypatch.setattr(api, "load_plan", failing(error))
    result = run(app, ["run"])
    assert result.exit_code == error.exit_code
    assert result.stderr == f"Error: {error}\n"


def test_a_bug_is_named_and_shows_its_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "load_plan", failing(ValueError("seven\nand more")))
    result = run(app, ["run"])
    assert result.exit_code == 70
    assert result.stderr == (
        "Error: a bug in cacheplan, ValueError: seven; run with --debug for the traceback.\n"
    )
    for arguments in (["--debug", "run"], ["run", "--debug"]):
        result = run(app, arguments)
        assert result.exit_code == 70
        assert "Traceback (most recent call last)" in result.stderr


@pytest.mark.parametrize(
    ("command", "kept"),
    [("profile", "finished prompts are kept"), ("refine", "were run are kept"), ("run", "")],
)
def test_an_interrupt_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, command: str, kept: str
) -> None:
    monkeypatch.setattr(api, "load_profile", lambda path: None)
    for name in ("profile", "refine", "generate"):
        monkeypatch.setattr(api, name, failing(KeyboardInterrupt()))
    result = run(app, [command])
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("Interrupted")
    assert kept in result.stderr
    assert ("run the same command to go on" in result.stderr) == bool(kept)


def test_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-c", "from cacheplan.cli import main; main()", "recipes", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Error" not in process.stderr.read()
    assert process.returncode == 1


def failing(error: BaseException) -> Any:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail
