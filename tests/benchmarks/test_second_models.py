"""Prompts and pictures of the second models, and the pages that show their results."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from cacheplan.zoo.recall.grammar import GLUE, WORDS, invented_words

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KINDS = ("after", "inside", "copies", "filler", "longer")


@pytest.fixture(scope="module")
def module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.syspath_prepend(str(BENCHMARKS / "peers"))
        yield importlib.import_module


@pytest.mark.parametrize("kind", KINDS)
def test_answers_can_be_read_from_the_context(module: Any, kind: str) -> None:
    families, language = module("recall_families"), invented_words(3)
    for seed in range(5):
        line = families.FAMILIES[kind](seed, language)
        words, continuation = line["context"].split(), line["continuation"]
        assert set(words) | set(continuation.split()) <= set(language.vocabulary)
        assert line["answers"]
        for start, end in line["answers"]:
            assert continuation[start:end] in words
            assert continuation[end : end + 1] in ("", " ")
        long = 1000 if kind == "longer" else 400
        assert 0.95 * long <= len(words) <= long + 400


def test_copies_are_what_the_context_ends_with(module: Any) -> None:
    line = module("recall_families").copies(4, WORDS)
    assert line["context"].endswith(line["continuation"])


def test_kinds_take_turns_and_share_no_seed(module: Any, tmp_path: Path) -> None:
    families = module("recall_families")
    file = families.write(tmp_path / "mixed.jsonl", KINDS, 10, families.HELDOUT, WORDS)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({line["context"] for line in lines}) == 10
    assert [len(line["context"].split()) > 900 for line in lines] == ([False] * 4 + [True]) * 2
    again = families.write(tmp_path / "alone.jsonl", ["after"], 1, families.CALIBRATION, WORDS)
    assert json.loads(again.read_text())["context"] != lines[0]["context"]


def test_a_model_says_which_words_it_knows(module: Any, tmp_path: Path) -> None:
    families = module("recall_families")
    (tmp_path / families.LANGUAGE).write_text(json.dumps({"invented_words": 5}))
    assert families.language_of(str(tmp_path)) == invented_words(5)
    assert families.language_of(None) is WORDS
    assert families.language_of(str(tmp_path / "elsewhere")) is WORDS


def test_patterns_depend_on_class_and_seed(module: Any) -> None:
    dit = module("second_dit")
    classes = torch.arange(dit.CLASSES)
    first, again, other = (
        dit.draw(classes, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert first.shape == (dit.CLASSES, 3, dit.SIZE, dit.SIZE)
    assert float(first.min()) >= -1
    assert float(first.max()) <= 1
    assert float((first - other).flatten(1).abs().mean(1).min()) > 0.05
    for index, (ink, paper) in enumerate(dit.PALETTES):
        mean = first[index * len(dit.PATTERNS)].mean((1, 2)) / 2 + 0.5
        low, high = torch.tensor([ink, paper]).aminmax(dim=0)
        assert bool(((mean > low) & (mean < high)).all())


def test_pages_show_every_run(module: Any) -> None:
    pages, rng = module("result_runs"), random.Random(0)
    head = {"command": "python x.py", "date": "2026-01-01", "device": "one", "versions": {"a": "1"}}
    rows = [
        {"axis": axis, "variant": name, "whole": "planned", "budget": budget}
        | {"kl": rng.random(), "times": 1.5, "times_interval": [1.0, 2.0], "recall": 0.5}
        for axis, name in (("", "planned"), ("solver", "another"))
        for budget in (0.5, 0.2)
    ]
    run = {**head, "prompts": 3, "rows": rows}
    text = pages.ablations_section({"runs": {"language: a": run, "language: b": run}})
    assert text.count("another (planned)") == 2
    assert "1.5 [1, 2]" in text
    assert text.count("python x.py") == 2
    crossed = [
        {"calibrated": a, "evaluated": b, "method": "m", "budget": 0.2, "kl": 0.25, "recall": 1.0}
        for a in ("x", "y")
        for b in ("x", "y")
    ]
    text = pages.transfer_section({"runs": {"language: a": {**run, "rows": crossed}}})
    assert "| y | 0.25, 100 % | 0.25, 100 % |" in text
    recipes = [
        {"budget": 0.2, "recipe": recipe, "kl": kl, "recall": 1.0}
        for recipe, kl in (("planned", 0.1), ("snapkv", 0.4), ("kivi", 0.08), ("joint", 0.04))
    ]
    second = {**run, "rows": recipes, "model": {"recall": 0.98765}}
    text = pages.second_section({"runs": {"language: a": second}})
    assert "recall 0.988." in text
    assert "**0.04**" in text
    assert "`planned` 0.25 (snapkv) and `joint` 0.5 (kivi) at 0.2." in text


def test_invented_words_are_a_language_of_their_own() -> None:
    words, others = invented_words(1), invented_words(2)
    assert words == invented_words(1) != others
    counts = [len(kind) for kind in (words.names, words.relations, words.values, words.filler)]
    assert counts == [
        len(kind) for kind in (WORDS.names, WORDS.relations, WORDS.values, WORDS.filler)
    ]
    assert len(words.vocabulary) == 3 + len(GLUE) + sum(counts)
    assert not set(words.vocabulary[3 + len(GLUE) :]) & set(WORDS.vocabulary)
    assert all(len(set(words.next[word])) == 4 for word in words.filler)
