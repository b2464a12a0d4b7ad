"""A training that is interrupted and given again ends in the same bits."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cacheplan.errors import InputError
from cacheplan.zoo.recall import checkpoint, train
from cacheplan.zoo.recall.checkpoint import Checkpoint
from cacheplan.zoo.recall.grammar import Mixture

TINY = train.Shape(kind="llama", layers=1, width=16, mlp=16, heads=2, kv_heads=1, head_dim=8)
WAYS = Mixture(names=4, relations=1, fact=0.3, question=0.4)
TOKENS = 128  # of a step


class Interrupted(BaseException):
    pass


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Call the script as a user does; it is interrupted at step `end`, its batch drawn.

    Returns how many steps were made.
    """
    monkeypatch.setattr(train, "BATCH_TOKENS", TOKENS)
    monkeypatch.setattr(train, "WARMUP_TOKENS", 3 * TOKENS)
    monkeypatch.setattr(train, "SHAPES", {"llama": TINY, "qwen3": TINY})
    monkeypatch.setattr(
        train,
        "CURRICULUM",
        (
            train.Stage(2 * TOKENS, 32, WAYS),
            train.Stage(3 * TOKENS, 32, WAYS, mastered=1e-4),  # ends early by chance
            train.Stage(0, 32, WAYS),  # four steps each, by --last
            train.Stage(0, 64, WAYS),
        ),
    )
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)  # it takes a minute
    drawn = train.batch

    def call(out: Path, *options: str, end: int | None = None, minutes: float = 0.0) -> int:
        count = 0

        def batch(*arguments: Any) -> Any:
            nonlocal count
            found = drawn(*arguments)
            if count == end:
                raise Interrupted
            count += 1
            return found

        monkeypatch.setattr(train, "batch", batch)
        monkeypatch.setattr(
            train, "Checkpoint", lambda path, identity: Checkpoint(path, identity, minutes=minutes)
        )
        last = ["--last", str(3.5 * TOKENS)]
        monkeypatch.setattr(sys, "argv", ["train", str(out), *last, *options])
        train.main()
        return count

    return call


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture
def whole(script: Callable[..., int], tmp_path: Path) -> tuple[int, bytes]:
    """Steps and weights of a training that nobody interrupts."""
    steps = script(tmp_path / "whole")
    assert steps in (11, 12, 13)
    assert not (tmp_path / "whole" / "training.pt").exists()
    return steps, weights(tmp_path / "whole")


@pytest.mark.parametrize("ends", [(1,), (2,), (5, 1, 3)])
def test_an_interrupted_training_ends_in_the_same_bits(
    script: Callable[..., int],
    whole: tuple[int, bytes],
    tmp_path: Path,
    ends: tuple[int, ...],
) -> None:
    steps, expected = whole
    out = tmp_path / "out"
    for end in ends:
        torch.manual_seed(end)  # nothing is left over from the process before
        with pytest.raises(Interrupted):
            script(out, end=end)
        assert [path.name for path in out.iterdir()] == ["training.pt"]
    assert script(out) == steps - sum(ends)
    assert weights(out) == expected
    assert not (out / "training.pt").exists()
    assert json.loads((out / "config.json").read_text())["hidden_size"] == TINY.width


def test_steps_since_the_last_writing_are_made_again(
    script: Callable[..., int],
    whole: tuple[int, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, expected = whole
    ticks = itertools.count()  # a minute passes whenever somebody looks
    clock = SimpleNamespace(monotonic=lambda: 60.0 * next(ticks))
    monkeypatch.setattr(checkpoint, "time", clock)
    with pytest.raises(Interrupted):
        script(tmp_path, end=8, minutes=9.0)
    assert not (tmp_path / "training.pt").exists()
    with pytest.raises(Interrupted):
        script(tmp_path, end=8, minutes=3.0)  # written after steps 3 and 6
    assert script(tmp_path, minutes=3.0) == steps - 6
    assert weights(tmp_path) == expected


def test_other_arguments_and_other_files_are_refused(
    script: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Interrupted):
        script(tmp_path, end=3)
    before = (tmp_path / "training.pt").read_bytes()
    for options in (["--seed", "1"], ["--invented-words", "2"], ["--last", "64"]):
        with pytest.raises(SystemExit) as caught:
            script(tmp_path, *options)
        assert caught.value.code == InputError.exit_code
        assert "repeat those it was begun with, or delete it" in capsys.readouterr().err
    assert (tmp_path / "training.pt").read_bytes() == before
    (tmp_path / "training.pt").write_bytes(before[:100])
    with pytest.raises(SystemExit):
        script(tmp_path)
    assert "Error: " in capsys.readouterr().err
