"""The folders at the root must never stand in the way of packages with the same names.

Python puts the current folder first on its path, so a regular package `kernels/` here would
replace the `kernels` package that transformers imports.  Without `__init__.py` it is only a
candidate for a namespace package, which any regular package beats.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "plans", "profilers", "solvers")


def run_at_root(*command: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bare_import_finds_no_regular_package_of_ours(name: str) -> None:
    run = run_at_root(sys.executable, "-c", f"import {name}; print({name}.__file__)")
    if run.returncode == 0 and run.stdout.strip() != "None":
        assert not Path(run.stdout.strip()).is_relative_to(ROOT)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_regular_package_of_the_same_name_wins(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    run = run_at_root(sys.executable, "-c", f"import {name}; print({name}.__file__)", path=tmp_path)
    assert run.stdout.strip() == str(tmp_path / name / "__init__.py")


@pytest.mark.parametrize("name", FOLDERS)
def test_the_folder_is_real_and_linked_into_the_package(name: str) -> None:
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()
    assert not (ROOT / name / "__init__.py").exists()
    assert (ROOT / "cacheplan" / name).resolve() == ROOT / name


def test_git_tracks_the_links_as_links() -> None:
    if shutil.which("git") is None or run_at_root("git", "rev-parse").returncode != 0:
        pytest.skip("not a git checkout")
    lines = run_at_root("git", "ls-files", "-s", "cacheplan").stdout.splitlines()
    links = {line.split("\t")[1] for line in lines if line.startswith("120000 ")}
    assert links == {f"cacheplan/{name}" for name in FOLDERS}
