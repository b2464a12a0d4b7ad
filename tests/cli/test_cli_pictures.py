"""The commands on a diffusion pipeline, as a user types them; nothing is replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from cacheplan.cli import app
from cacheplan.plans.io import read_plan
from cacheplan.types import FeaturePlan

GOLDEN = Path(__file__).parents[1] / "plans" / "golden_plan.json"


def cacheplan(command: str, code: int = 0, *more: str) -> Any:
    result = CliRunner().invoke(app, [*command.split(), *more])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    return json.loads(result.stdout) if "--json" in command else result


@pytest.fixture(scope="module")
def measured(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a profile, two plans, and the prompts."""
    folder = tmp_path_factory.mktemp("pictures")
    for file in tiny_shapes.parent.glob("*.*"):
        shutil.copy(file, folder)
    where = f"--call {folder}/settings.json --prompts {folder}/calibration.txt"
    cacheplan(f"profile {tiny_shapes} {where} --ablate 1 --out {folder}/profile.safetensors")
    for name, recipe in (("plan", "planned"), ("uniform", "uniform")):
        solve = f"solve {folder}/profile.safetensors --budget 0.6 --recipe {recipe}"
        cacheplan(f"{solve} --out {folder}/{name}.json")
    shutil.copy(GOLDEN, folder / "language.json")
    return folder


@pytest.fixture
def folder(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the measured one."""
    shutil.copytree(measured, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_run_writes_a_picture_and_says_what_it_took(folder: Path) -> None:
    found = cacheplan("run --seed 3 --prompt", 0, "one red star")
    assert found.stdout == "out.png\n"
    with Image.open("out.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 64))
    closing = found.stderr.splitlines()[-2]
    assert closing.startswith('"one red star", seed 3: 8 steps in ')
    assert "% planned, " in closing
    assert closing.endswith("measured; forecast: naive")
    told = cacheplan("run --seed 3 -o b.jpg --json --prompt", 0, "one red star")["picture"]
    assert told == "b.jpg"
    assert Path("b.jpg").exists()


def test_run_takes_arguments_and_settings_from_files(folder: Path) -> None:
    Path("what.json").write_text('{"prompt": "one red star"}')
    cacheplan("run --arguments what.json --call settings.json --cache-memory 64MiB -o a.png")
    cacheplan("run --prompt-file calibration.txt -o b.png")
    assert Path("a.png").read_bytes() != Path("b.png").read_bytes()


def test_verify_writes_the_measurement_that_show_repeats(folder: Path) -> None:
    found = cacheplan("verify --prompts heldout.jsonl --write --json")
    assert found["counted_flops"] == found["planned_flops"] < found["full_flops"]
    plan = read_plan("plan.json")
    assert isinstance(plan, FeaturePlan)
    assert plan.measured is not None
    assert plan.measured.error == found["measured"]["error"]
    assert plan.measured.prompts == 2
    shown = cacheplan("show").stdout
    assert f"error {plan.measured.error:.3g} on 2 prompts, PSNR" in shown
    assert "predicted" in cacheplan("verify --prompts heldout.jsonl --limit 1").stdout


def test_refine_moves_steps_and_goes_on(folder: Path) -> None:
    where = "--profile profile.safetensors --prompts calibration.txt"
    first = cacheplan(f"refine uniform.json {where} --evaluations 2")
    assert first.stdout.startswith("refined.json: uniform for ")
    assert "certified  local search: Refined from the measured error " in first.stdout
    assert "goes on from refined.json.part" in first.stderr
    assert first.stderr.endswith("Next: cacheplan verify refined.json\n")
    told = cacheplan(f"refine uniform.json {where} --limit 2 --json")  # as many as there are
    assert told["finished"]
    assert told["certificate"]["solver"] == "local search"
    assert told["provenance"]["command"] == (
        "cacheplan refine uniform.json --profile profile.safetensors --limit 2"
    )
    assert not Path("refined.json.part").exists()
    cacheplan("verify refined.json --prompts heldout.jsonl --limit 1")
    refused = cacheplan(f"refine language.json {where}", 2)
    assert "is for a language model, but the profile is of a diffusion model" in refused.stderr


def test_show_maps_blocks_and_steps(folder: Path) -> None:
    shown = cacheplan("show uniform.json --png map.png").stdout
    plan = read_plan("uniform.json")
    assert isinstance(plan, FeaturePlan)
    skipped = {entry.step for entry in plan.entries}
    line = "".join("RR" if step in skipped else "██" for step in range(8))
    assert "block 0         5" in shown
    assert f"  0-2 {line}" in shown
    assert "  █  computed" in shown
    with Image.open("map.png") as picture:
        assert picture.format == "PNG"
    profile = cacheplan("show profile.safetensors").stdout
    assert "change over steps" in profile
    assert "hidden" in profile
    assert cacheplan("show profile.safetensors --json")["family"] == "diffusion"


def test_compare_draws_a_grid_and_a_table(folder: Path) -> None:
    found = cacheplan("compare plan.json uniform.json --prompts heldout.jsonl")
    table, *_ = found.stdout.split("LPIPS is not measured")
    rows = [line.split()[0] for line in table.splitlines()[2:]]
    assert rows == ["full", "plan", "uniform"]
    with Image.open("compare.png") as sheet:
        assert sheet.width > 3 * 192
        assert sheet.height > 2 * 192
    told = cacheplan("compare plan.json --prompts heldout.jsonl --limit 1 -o a.png --json")
    assert told["picture"] == "a.png"
    assert told["plans"]["plan"]["measured"]["prompts"] == 1


def test_lpips_is_told_where_it_can_be_measured(folder: Path, lpips_stand_in: Path) -> None:
    where = "--prompts heldout.jsonl --limit 1"
    found = cacheplan(f"verify {where} --write --json")
    assert 0 < found["measured"]["lpips"] < 2
    assert found["without_lpips"] is None
    shown = cacheplan("show").stdout
    assert f", LPIPS {found['measured']['lpips']:.3g}" in shown
    compared = cacheplan(f"compare plan.json {where}").stdout
    assert "LPIPS" in compared.splitlines()[0]
    lpips_stand_in.unlink()
    for command in (f"compare plan.json {where}", f"verify {where}"):
        table, reason = cacheplan(command).stdout.split("LPIPS is not measured, ")
        assert "LPIPS" not in table
        assert f"{lpips_stand_in.name} is missing" in " ".join(reason.split())


def test_diff_and_recipes_know_pictures(folder: Path) -> None:
    assert "recipe: planned -> uniform" in cacheplan("diff plan.json uniform.json").stdout
    listed = cacheplan("recipes --json")["recipes"]
    families = {
        recipe["name"]: recipe["family"] for recipe in listed if recipe["name"] != "planned"
    }
    assert families["taylorseer"] == "diffusion"
    assert families["snapkv"] == "language"
    assert "diffusion" in cacheplan("recipes").stdout


def test_gradients_show_which_parts_matter(folder: Path, tiny_shapes: Path) -> None:
    where = "--call settings.json --prompts calibration.txt --ablate 1"
    assert "moves at a step" not in cacheplan("show profile.safetensors").stdout
    cacheplan(f"profile {tiny_shapes} {where} --gradients 1 --out followed.safetensors")
    found = cacheplan("show followed.safetensors").stdout
    for what in ("a block", "attention of a block", "cross attention of a block", "mlp of a block"):
        assert f"how far the model's output moves at a step that holds {what} (" in found
    maps = found[found.index("how far") :]
    assert "9" in maps.replace("is 9", "")
    assert "    0 " in maps
    assert "    2 " in maps
    cacheplan("solve followed.safetensors --budget 0.6 --out followed.json")
    refused = cacheplan(f"profile {tiny_shapes} {where} --gradients -1 --out other.safetensors", 2)
    assert "--gradients is -1, expected at least 0 prompts." in refused.stderr
    refused = cacheplan("profile --gradients 1 --out other.safetensors", 2)
    assert "gradients" in refused.stderr
    assert not Path("other.safetensors").exists()


def test_shards_merge_to_the_same_bytes(folder: Path, tiny_shapes: Path) -> None:
    where = "--call settings.json --prompts calibration.txt --ablate 1"
    for i in range(2):
        told = cacheplan(f"profile {tiny_shapes} {where} --shard {i}/2 --out {i}.safetensors")
        assert told.stdout == f"{i}.safetensors: shard {i}/2\n"
    told = cacheplan("merge 0.safetensors 1.safetensors --out merged.safetensors")
    assert "cacheplan solve merged.safetensors --budget 0.4" in told.stderr
    assert Path("merged.safetensors").read_bytes() == Path("profile.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [
        ("run --plan plan.json --max-new-tokens 3", 2, "--max-new-tokens does not fit"),
        ("run --plan plan.json --temperature 1", 2, "--temperature does not fit"),
        ("run --plan language.json -o a.png", 2, "--out does not fit"),
        ("run --plan language.json --cache-memory 1MiB", 2, "--cache-memory does not fit"),
        ("run --plan plan.json", 2, "brings no heldout prompts"),
        ("run --plan plan.json -p a -o a.gif", 2, 'the ending ".gif"'),
        ("run --plan plan.json -p a -o no/a.png", 2, "cannot write no/a.png"),
        ("run --plan plan.json -p a --cache-memory 9", 2, "no unit of bytes"),
        ("run --plan plan.json -p a --cache-memory 9B", 5, "cache_memory allows 9"),
        ("run --plan plan.json -p a --model shapes", 4, "digest of configuration"),
        ("run --plan plan.json --arguments {", 2, "--arguments is not JSON"),
        ("run --plan plan.json --arguments no.json", 2, "nor a file that can be read"),
        ("run --plan plan.json --arguments [1]", 2, "neither a JSON object"),
        ('run --plan plan.json -p a --call {"eta":"x"}', 2, "--call sets eta to 'x'"),
        (
            'run --plan plan.json -p a --call {"num_inference_steps":9}',
            4,
            "call setting num_inference_steps is 8",
        ),
        ("run --plan truncated.json -p a", 3, "the file ends in the middle"),
        ("verify plan.json", 2, "brings no heldout prompts"),
        ("verify plan.json --prompts calibration.txt", 2, "calibrated on"),
        ("verify plan.json --split 0.5", 2, "--split is for language models"),
        ("verify language.json --call {}", 2, "--call is for plans of diffusion"),
        ("compare plan.json language.json", 4, "whose family is diffusion"),
        ("compare plan.json -o a.txt", 2, 'the ending ".txt"'),
        ("compare plan.json plan.json", 2, "A plan is given twice"),
        ("compare language.json -o a.png", 2, "--out does not fit"),
        ("show profile.safetensors --png a.png", 2, "is a profile"),
        ("show plan.json --png a.jpg", 2, "written as .png"),
        ("solve --budget 0", 2, 'The budget "0" would keep 0'),
        ("solve --budget 2", 2, 'The budget "2" would keep 2'),
        ("solve --budget 512tok", 2, "unit for caches of language models"),
        ("solve --budget 1e-4", 6, "smallest feasible"),
        ("solve --budget 0.5 --recipe snapkv", 2, 'The recipe "snapkv" is for'),
        ("solve --budget 0.5 --recipe nothing", 2, 'There is no recipe "nothing"'),
        ("solve --budget 0.5 --length 9", 2, "--length is for language models"),
        ("solve --budget 0.5 --decode-every 9", 2, "--decode-every is for language models"),
        ("profile --steps 9", 2, "--steps is for diffusion models"),
        ("profile --call {}", 2, "--call is for diffusion models"),
        ("profile --lags 3", 2, "--lags is for diffusion models"),
        ("profile --family diffusion --split 0.5", 2, "--split is for language models"),
        ("profile --family video", 2, "expected language or diffusion"),
        ("profile --family diffusion --steps 3", 5, "takes 3 steps"),
        ("profile none --family diffusion", 2, 'The pipeline "none" could not be loaded'),
    ],
)
def test_what_cannot_be_done(folder: Path, command: str, code: int, sentence: str) -> None:
    text = Path("plan.json").read_text()
    Path("truncated.json").write_text(text[: len(text) // 2])
    before = set(folder.iterdir())
    result = cacheplan(command, code)
    assert sentence in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert result.stdout == ""
    assert set(folder.iterdir()) == before
