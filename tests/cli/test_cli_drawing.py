"""Heat maps, words and progress, as a person sees them."""

from __future__ import annotations

import io
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cacheplan.cli.heatmap import Heatmap, legend, plan_heatmap
from cacheplan.cli.kv_facts import cells, scorer_words
from cacheplan.cli.numbers import count, percent, size
from cacheplan.cli.progress import progress
from cacheplan.plans.check import kv_only
from cacheplan.plans.io import read_plan
from cacheplan.recipes import RECIPES
from cacheplan.types import Entry, KVAction, Random, Site, WindowAttention

PLAN = kv_only(read_plan(Path(__file__).parents[1] / "plans" / "golden_plan.json"), "test")


def drawn(heatmap: Heatmap, width: int = 80, *, colours: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, color_system="truecolor" if colours else None
    )
    with console.capture() as found:
        console.print(heatmap)
    return found.get()


def test_a_plan_shows_kept_percent_and_who_chooses() -> None:
    heatmap, scorers = plan_heatmap(PLAN)
    assert drawn(heatmap).splitlines() == [
        "layer   0    1  ",
        "    0  70w  10p ",
        "    1  35w  35w ",  # decided together
        "    2  30d  60a ",
    ]
    assert legend(scorers) == [
        "  a  accumulated_attention (mean)",
        "  d  key_difference",
        "  p  position",
        "  w  window_attention or window_attention (window 16, pool 7, pooling max)",
    ]


def test_nothing_is_told_from_next_to_nothing() -> None:
    entry = Entry(site=Site(layer=1, head=0), action=KVAction(keep=0.001))
    heatmap, _ = plan_heatmap(replace(PLAN, entries=(entry,)))
    assert drawn(heatmap).splitlines()[1:3] == ["    0   .    .  ", "    1  <1p   .  "]


def test_more_heads_than_columns_go_below() -> None:
    heatmap = Heatmap(np.full((1, 5), 0.5), ["wwwww"])
    assert drawn(heatmap, 21).splitlines() == [
        "layer   0    1    2  ",
        "    0  50w  50w  50w ",
        "layer   3    4  ",
        "    0  50w  50w ",
    ]


def test_the_background_tells_small_from_large() -> None:
    text = drawn(Heatmap(np.array([[0.0, 1.0]]), ["ww"]), colours=True)
    assert "48;2;68;1;84" in text
    assert "48;2;253;231;37" in text


def test_words() -> None:
    assert [size(0), size(1023), size(1024), size(3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 GiB",
    ]
    assert percent(None) == "-"
    assert [count(7), count(15_750_266_880)] == ["7 ", "15.8 G"]
    assert scorer_words(Random(seed=3)) == "random (seed 3)"
    assert scorer_words(WindowAttention()) == "window_attention"
    assert cells(RECIPES["h2o"]).endswith("again every 1 new tokens")
    assert cells(RECIPES["adakv"]).startswith("uniform; window_attention (pool 7, pooling max)")
    assert cells(RECIPES["epicache"]).startswith(
        "proportional to block_distance, at least 0.25 of the mean; window_attention"
    )
    assert cells(RECIPES["compresskv"]) == (
        "proportional to output_error, at least 32, at most 3 times the mean; "
        "window_attention (window 8), recent 8, one set per layer; chosen by 4 retrieval heads"
    )
    assert scorer_words(WindowAttention(window=8, heads=(2, 5))) == (
        "window_attention (window 8, 2 heads)"
    )


def test_plain_progress_speaks_at_most_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress("Profiling") as report:
        for done in range(2, 10):  # goes on after an interruption: 2 of 10 were there
            report(done, 10, "measuring")
            now += 2
    assert capsys.readouterr().err.splitlines() == [
        "Profiling: loading the model",
        "Profiling: measuring, 2/10 prompts",
        "Profiling: measuring, 5/10 prompts, 0.5/s, 0:10 left",
        "Profiling: measuring, 8/10 prompts, 0.5/s, 0:04 left",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("Profiling") as report:
        report(1, 2, "measuring")
    assert "loading the model" in terminal.getvalue()
    assert "1/2 prompts" in terminal.getvalue()
