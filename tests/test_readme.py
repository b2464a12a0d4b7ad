"""The README's figures are those of the stored measurement."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

from cacheplan.recipes import FEATURE_RECIPES

ROOT = Path(__file__).parents[1]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_shows_the_measured_numbers() -> None:
    markdown = load(ROOT / "benchmarks" / "markdown.py")
    result = json.loads((ROOT / "benchmarks" / "results" / "recipes.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert markdown.recipe_table(result, markdown.RECIPES) in readme
    assert markdown.headline(result) in " ".join(readme.split())


def test_readme_shows_the_measured_numbers_of_features() -> None:
    markdown = load(ROOT / "benchmarks" / "markdown.py")
    result = json.loads((ROOT / "benchmarks" / "results" / "features.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert markdown.feature_table(result, markdown.FEATURES) in readme
    assert markdown.feature_headline(result) in " ".join(readme.split())


def test_readme_shows_the_measured_bits_times_and_memory() -> None:
    markdown = load(ROOT / "benchmarks" / "markdown.py")
    readme = (ROOT / "README.md").read_text()
    for name, table in (
        ("bits", markdown.bits_table),
        ("decode_cpu", markdown.decode_table),
        ("prefill_memory", markdown.memory_table),
    ):
        result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert table(result) in readme, name


def test_joint_bits_and_tokens_win_at_every_budget() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "bits.json").read_text())
    for budget in {row["budget"] for row in result["rows"]}:
        rows = [row for row in result["rows"] if row["budget"] == budget]
        assert all(row["bytes"] <= budget + 1e-9 for row in rows), budget
        assert min(rows, key=lambda row: row["kl"])["recipe"] == "joint", budget


def test_readme_shows_the_measured_graph_breaks() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "compiling.json").read_text())
    readme = (ROOT / "README.md").read_text()
    names = {
        "null plan": "null plan",
        "plan": "plan at 0.5",
        "diffusers FirstBlockCache": "diffusers' FirstBlockCache",
        "diffusers TaylorSeerCache": "diffusers' TaylorSeerCache",
    }
    for row in result["rows"]:
        if row["arm"] in names:
            breaks = " / ".join(str(row[kind]["graph_breaks"]) for kind in ("whole", "blocks"))
            figures = f"{row['compute']:.2f} | {row['time']:.2f} | {breaks}"
            assert f"| {names[row['arm']]} | {figures} |" in readme


def test_feature_plans_count_the_flops_they_plan() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "features.json").read_text())
    gated = {row.name for row in FEATURE_RECIPES.values() if row.gate}  # they promise nothing
    for row in result["rows"]:
        if "planned_compute" in row and row["recipe"] not in gated:
            assert abs(row["compute"] - row["planned_compute"]) < 1e-9, row
            assert row["compute"] <= row["budget"] + 1e-9, row


def test_every_stored_row_holds_its_promises() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "recipes.json").read_text())
    for row in result["rows"]:
        assert row["planned_bytes"] == row["measured_bytes"]
        assert row["measured_bytes"] <= row["budget"] * row["full_bytes"]


def test_linked_files_exist() -> None:
    import re

    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), target
