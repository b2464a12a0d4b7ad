"""What each command prints where, and what it passes on; the API is a stand-in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cacheplan import __version__, api
from cacheplan.cli import app
from cacheplan.plans.check import kv_only
from cacheplan.plans.io import read_plan, write_plan
from cacheplan.recipes import RECIPES
from cacheplan.types import (
    Damage,
    KeyDifference,
    KVAction,
    KVProfile,
    LanguageSpec,
    Position,
    Statistic,
)
from cacheplan.verification import Verification

run = CliRunner().invoke
GOLDEN = Path(__file__).parents[1] / "plans" / "golden_plan.json"
PLAN = replace(kv_only(read_plan(GOLDEN), "test"), measured=None)
DAMAGE = Damage(
    kl=0.0456, agreement=0.98, recall=0.9, full_recall=0.95, nll=1.5, full_nll=1.4, prompts=48
)
VERIFIED = Verification(
    damage=DAMAGE,
    planned_bytes=2048,
    measured_bytes=2048,
    full_bytes=10240,
    kl_per_prompt=(0.0456,),
)
GENERATED = api.Generation(
    prompt="the river was calm . recall the colour of kevin is",
    text="lamp stone",
    prompt_tokens=40,
    new_tokens=3,
    prefill_seconds=0.1,
    decode_seconds=0.5,
    planned_bytes=2048,
    measured_bytes=2048,
    full_bytes=10240,
    path="naive",
)


def profile_of(model: LanguageSpec) -> KVProfile:
    """A profile in which the first candidate is best everywhere, and later heads matter more."""
    candidates = tuple(KVAction(keep=1.0, scorer=s) for s in (KeyDifference(), Position()))
    keeps = (0.05, 0.1, 0.2, 0.5, 1.0)
    damage = np.ones((model.layers, model.kv_heads, len(candidates), len(keeps)))
    damage[:, :, 0] = 0.5
    kl = np.arange(model.layers * model.kv_heads) / 100
    arrays = {
        "damage": damage,
        "ablation_kl": kl.reshape(model.layers, model.kv_heads, 1),
        "context_length": np.array(100.0),
        "continuation_length": np.array(20.0),
    }
    return KVProfile(
        model=model,
        statistics={k: Statistic((), 24, v, np.zeros_like(v)) for k, v in arrays.items()},
        keeps=keeps,
        candidates=candidates,
        probes=((0, 1),),
        prompts=24,
        prompts_digest="sha256:1",
        seed=0,
    )


@pytest.fixture
def quick_api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Replace what needs a model, in an empty folder with a plan.json; holds the arguments."""
    calls: dict[str, dict[str, Any]] = {}

    def stand_in(name: str, result: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] = {"args": args, **kwargs}
            if progress := kwargs.get("progress"):
                progress(1, 2, "measuring")
            if on_text := kwargs.get("on_text"):
                on_text(GENERATED.text)
            return result

        return call

    results = {"solve": PLAN, "verify": VERIFIED, "generate": GENERATED}
    results |= dict.fromkeys(("profile", "merge", "load_profile"), profile_of(PLAN.model))
    for name, result in results.items():
        monkeypatch.setattr(api, name, stand_in(name, result))

    def compare(plans: Sequence[Any], **kwargs: Any) -> api.Comparison:
        calls["compare"] = {"args": (plans,), **kwargs}
        return api.Comparison((VERIFIED,) * len(plans), ())

    monkeypatch.setattr(api, "compare", compare)
    monkeypatch.chdir(tmp_path)
    write_plan(PLAN, "plan.json")
    return calls


COMMANDS = {
    "profile": ("24 prompts", "cacheplan solve --budget 0.2"),
    "profile --out other.safetensors": ("24 prompts", "solve other.safetensors --budget 0.2"),
    "merge a b": ("24 prompts", "cacheplan solve --budget 0.2"),
    "solve --budget 0.3": ("0.4: keeps 40.0 %", "cacheplan run --plan plan.json"),
    "run": ("lamp stone", "cacheplan verify plan.json"),
    "verify": ("0.0456", "cacheplan show plan.json"),
    "show": ("  layer", "cacheplan verify plan.json --write"),
    "show profile.safetensors": ("damage when keeping", "solve profile.safetensors --budget"),
    "diff plan.json plan.json": ("The plans do the same.", "cacheplan show plan.json"),
    "recipes": ("2404.14469", "cacheplan solve --budget 0.2 --recipe snapkv"),
    "compare plan.json": ("same top token", "cacheplan show plan.json"),
    "demo --family language": ("streaming_llm", "cacheplan profile MODEL --prompts FILE"),
    "demo --family language --dir files": ("streaming_llm", "cacheplan show files/plan.json"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_result_on_stdout_and_the_next_command_on_stderr(quick_api: Any, command: str) -> None:
    result = run(app, command.split())
    assert result.exit_code == 0, result.stderr
    answer, following = COMMANDS[command]
    assert answer.strip() in result.stdout
    assert re.search(f"^Next: .*{re.escape(following)}", result.stderr, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_object_on_stdout(quick_api: Any, command: str) -> None:
    result = run(app, [*command.split(), "--json"])
    assert result.exit_code == 0, result.stderr
    assert isinstance(json.loads(result.stdout), dict)
    assert "Next: " in result.stderr


def test_the_three_commands_agree_on_their_files(quick_api: Any) -> None:
    run(app, ["profile"])
    run(app, ["solve", "--budget", "0.2"])
    run(app, ["run", "--plan", "plan.json"])
    assert quick_api["profile"]["args"] == (None,)
    assert quick_api["profile"]["out"] == quick_api["load_profile"]["args"][0]
    assert quick_api["profile"]["shard"] == (0, 1)
    assert quick_api["solve"]["budget"] == "0.2"
    assert quick_api["solve"]["recipe"] == "planned"
    assert quick_api["generate"]["prompt"] is None


def test_the_recorded_command_makes_the_plan_again(quick_api: Any) -> None:
    command = "cacheplan solve my.safetensors --budget 2GiB --recipe h2o --solver milp --length 9"
    run(app, [*command.split()[1:], "--out", "elsewhere.json"])
    assert quick_api["solve"]["command"] == command
    assert Path("elsewhere.json").exists()


def test_a_shard_suggests_merging(quick_api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "profile", lambda *args, **kwargs: None)
    result = run(app, ["profile", "--shard", "1/4", "--out", "one.safetensors"])
    assert result.stdout == "one.safetensors: shard 1/4\n"
    assert "Next: cacheplan merge" in result.stderr


def test_verify_writes_the_measurement_only_when_asked(quick_api: Any) -> None:
    run(app, ["verify"])
    assert kv_only(read_plan("plan.json"), "test").measured is None
    run(app, ["verify", "--write"])
    measured = kv_only(read_plan("plan.json"), "test").measured
    assert measured is not None
    assert measured.kl == 0.0456
    shown = run(app, ["show"])
    assert "KL 0.0456 on 48 prompts, 98.0 % same top token, recall 90.0 of 95.0 %" in shown.stdout


def test_show_a_profile_maps_sensitivity(quick_api: Any) -> None:
    shown = run(app, ["show", "profile.safetensors"]).stdout
    assert "in percent of the largest (0.05)" in shown
    assert "layer   0    1  \n    0   0d  20d \n    1  40d  60d \n    2  80d 100d \n" in shown


def test_run_reads_prompts_from_files_and_stdin(quick_api: Any) -> None:
    Path("prompt.txt").write_text("once upon")
    run(app, ["run", "--prompt-file", "prompt.txt"])
    assert quick_api["generate"]["prompt"] == "once upon"
    run(app, ["run", "--prompt-file", "-"], input="a time")
    assert quick_api["generate"]["prompt"] == "a time"


def test_run_closes_with_speed_and_bytes(quick_api: Any) -> None:
    result = run(app, ["run"])
    assert "The prompt ended: ... calm . recall the colour of kevin is" in result.stderr
    assert (
        "40 + 3 tokens, 4.0 tokens/s; cache 2.0 KiB planned, 2.0 KiB measured, 20.0 % of full; "
        "attention: naive" in result.stderr
    )


def test_recipes_lists_all_of_them(quick_api: Any) -> None:
    shown = run(app, ["recipes"]).stdout
    assert all(name in shown for name in RECIPES)


def test_version_and_help_teach() -> None:
    assert run(app, ["--version"]).stdout == f"cacheplan {__version__}\n"
    assert "cacheplan solve --budget 0.2" in run(app, []).output
    for name in dict.fromkeys(command.split()[0] for command in COMMANDS):
        text = run(app, [name, "--help"]).stdout
        assert re.search(rf"Examples?:\n    cacheplan {name}", text)
