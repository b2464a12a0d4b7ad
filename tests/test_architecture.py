"""The floors: imports go down only, serving stays light, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cacheplan", "profilers", "solvers", "kernels", "plans")  # links are not followed
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]

GROUND = {"types", "errors", "atomic", "environment", "placement"}
PLANS = GROUND | {"plans", "solvers"}
MODELS = GROUND | {"plans", "kernels", "scorers", "adapters"}
TABLES = {"recipes", "budget", "readings", "readings_bits"}
TABLES |= {"formulate", "formulate_bits", "formulate_features"}
ALL = PLANS | MODELS | TABLES | {"profilers", "runtime"}
INPUTS = {"inputs", "picture_inputs", "pictures"}
WORK = {"generation", "drawing", "verification", "picture_verification", "measuring", "zoo"}
WORK |= {"picture_refinement", "cache_refinement", "processes"}
API = ALL | INPUTS | WORK | {"language", "diffusion", "api"}
MAY_IMPORT = {
    "types": set(),
    "errors": set(),
    "environment": set(),
    "placement": set(),
    "processes": {"errors"},
    "atomic": {"errors"},
    "kernels": set(),
    "plans": GROUND,
    "solvers": GROUND,
    "scorers": GROUND | {"kernels"},
    "adapters": GROUND | {"kernels", "plans"},
    "profilers": MODELS,
    "runtime": MODELS,
    "recipes": PLANS,
    "budget": PLANS,
    "readings": GROUND,
    "formulate_heads": GROUND | {"readings"},
    "formulate_layers": GROUND | {"readings"},
    "readings_bits": GROUND | {"plans", "readings"},
    "formulate_bits": PLANS | {"readings_bits"},
    "formulate": PLANS
    | {"readings", "readings_bits", "formulate_bits", "formulate_heads", "formulate_layers"},
    "schedules": PLANS | {"recipes"},
    "formulate_features": PLANS | {"schedules"},
    "pictures": set(),
    "perceptual": GROUND | {"pictures"},
    "picture_grid": GROUND,
    "inputs": ALL | {"zoo"},
    "picture_inputs": ALL | {"zoo"},
    "measuring": ALL | {"processes"},
    "generation": ALL | INPUTS,
    "drawing": ALL | INPUTS,
    "verification": ALL,
    "picture_verification": ALL | INPUTS | {"perceptual"},
    "picture_weights": GROUND,
    "picture_refinement": ALL | {"picture_weights"},
    "cache_refinement": ALL,
    "language": ALL | INPUTS | WORK,
    "diffusion": ALL | INPUTS | WORK,
    "zoo": ALL,
    "api": API,
    "frontier": GROUND | {"api", "recipes"},
    "intervals": set(),
    "": API,  # the package itself: names that are loaded on first use
    "__main__": {"cli"},
    "cli": GROUND
    | {"plans", "kernels", "recipes", "budget", "readings_bits", "api"}
    | {"picture_inputs", "picture_grid", "verification", "picture_verification", "frontier"}
    | {"intervals"},
}


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to; "" for `cacheplan/__init__.py`."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    part = rest[0] if folder == "cacheplan" else folder
    return "" if part == "__init__" else part


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every part of ours that a file imports, and whether it does so inside a function."""
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    inner = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top, *rest = name.split(".")
            if top == "cacheplan" and rest and rest[0] in MAY_IMPORT:
                yield rest[0], id(node) in inner


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    part = part_of(path)
    allowed = MAY_IMPORT.get(part)
    assert allowed is not None, f"give {part} a floor in MAY_IMPORT"
    for found, inside in imports(path):
        embedded = part == "adapters" and found == "zoo" and inside  # where the model's folder is
        assert found == part or found in allowed or embedded, f"{part} must not import {found}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("cacheplan.plans.io", {"torch", "scipy", "typer", "rich", "transformers"}),
        ("cacheplan.runtime", {"scipy", "typer", "rich", "transformers"}),
        ("cacheplan.runtime.features.apply", {"scipy", "typer", "rich", "diffusers"}),
        ("cacheplan.cli", {"torch", "scipy", "transformers", "diffusers", "safetensors", "PIL"}),
    ],
)
def test_a_module_loads_nothing_heavy(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_files_are_small_and_named_for_what_they_hold() -> None:
    for path in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        assert path.stem not in {"utils", "helpers", "common", "misc"}, path
        assert len(path.read_text().splitlines()) <= 400, path
