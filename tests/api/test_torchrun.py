"""`torchrun` starts the processes of one profile: killed, finished, failing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cacheplan import api
from cacheplan.picture_inputs import read_settings
from cacheplan.profilers.store import read_state

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def start(processes: int, *arguments: object) -> subprocess.Popen[str]:
    command = [*TORCHRUN, str(processes), "-m", "cacheplan", "profile", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(process: int) -> list[int]:
    return [
        int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    out, whole = tmp_path / "profile.safetensors", tmp_path / "whole.safetensors"
    options = ("--limit", 4, "--ablate", 2, "--out", out)
    part = out.with_name(out.name + ".1.part")
    run = start(2, *options)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (part.exists() and read_state(part).done):
        time.sleep(0.01)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    run.communicate(timeout=60)
    assert run.returncode != 0
    assert not out.exists()
    kept = read_state(part).done
    assert 0 < len(kept) < 4

    api.profile(out=out, limit=4, ablate=2)  # one process takes both parts up
    api.profile(out=whole, limit=4, ablate=2)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.iterdir()) == [out, whole]


def test_pictures_and_errors(tiny_shapes: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "profile.safetensors", tmp_path / "whole.safetensors"
    prompts, call = tiny_shapes.parent / "calibration.txt", tiny_shapes.parent / "settings.json"
    options = (tiny_shapes, "--prompts", prompts, "--ablate", 1, "--out", out)
    run = start(2, *options, "--call", call)
    wrong = start(2, *options, "--call", tmp_path / "missing.json")
    answer, words = run.communicate(timeout=120)
    assert run.returncode == 0, words
    assert answer.count("2 prompts") == 1, "one process speaks"
    assert words.count("loading the model") == words.count("Next: cacheplan solve") == 1
    api.profile(
        str(tiny_shapes), prompts=prompts, settings=read_settings(str(call)), ablate=1, out=whole
    )
    assert out.read_bytes() == whole.read_bytes()
    _, words = wrong.communicate(timeout=60)
    assert wrong.returncode != 0
    assert words.count("Error: --call is") == 1, "one process speaks"
