"""The embedded model is good enough to tell methods apart, and its prompts are what they claim."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from cacheplan.adapters.language import load
from cacheplan.errors import InputError
from cacheplan.profilers.prompts import Prompt, load_prompts
from cacheplan.recipes import RECIPES
from cacheplan.types import Budget, Entry, KVPlan, Site
from cacheplan.verification import measure_damage
from cacheplan.zoo import embedded_path, embedded_prompts
from cacheplan.zoo.recall.grammar import BOS, Mixture, document, recall_prompt
from cacheplan.zoo.recall.make_prompts import MIXTURE, QUESTIONS, SPLITS, asked, record, records


@pytest.fixture(scope="module")
def recall() -> Any:
    return load("recall")


def drawn(tokenizer: Any, words: int, count: int, folder: Path) -> list[Prompt]:
    """Fresh prompts whose whole text has at least about `words` words."""
    lines = []
    for seed in range(count):
        before, after, answers = recall_prompt(
            random.Random(70_000 + seed), words - 120, QUESTIONS, MIXTURE
        )
        lines.append(
            {"context": before.removeprefix(f"{BOS} "), "continuation": after, "answers": answers}
        )
    return loaded_prompts(lines, tokenizer, folder)


def loaded_prompts(lines: list[Any], tokenizer: Any, folder: Path) -> list[Prompt]:
    path = folder / "drawn.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return load_prompts(path, tokenizer, split=0.8, limit=None, longest=2048)


@pytest.mark.parametrize(("words", "least"), [(512, 0.95), (1024, 0.90)])
def test_full_cache_recalls(recall: Any, tmp_path: Path, words: int, least: float) -> None:
    right = total = 0
    for prompt in drawn(recall.tokenizer, words, 10, tmp_path):
        ids = torch.tensor([prompt.context + prompt.continuation])
        with torch.no_grad():
            predicted = recall.model(input_ids=ids, use_cache=False).logits[0].argmax(-1)
        for start, end in prompt.answers:
            at = len(prompt.context) + start
            said = predicted[at - 1 : at - 1 + end - start]
            right += bool((said == ids[0, at : at + end - start]).all())
            total += 1
    assert right / total >= least


def test_random_eviction_of_four_fifths_breaks_it(recall: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    (candidate,) = RECIPES["random"].candidates
    plan = KVPlan(
        model=recall.spec,
        recipe="random",
        budget=Budget(asked="0.2", kept=0.2, reached=0.2, length=400),
        entries=tuple(
            Entry(site=Site(layer=layer), action=replace(candidate, keep=0.2))
            for layer in range(recall.spec.layers)
        ),
        **_unknown(),
    )
    found = measure_damage(recall.model, plan, drawn(recall.tokenizer, 512, 10, tmp_path))
    assert found.damage.recall is not None
    assert found.damage.recall < 0.5


def _unknown() -> dict[str, Any]:
    from cacheplan.types import Certificate, Provenance, Trigger

    return {
        "trigger": Trigger(),
        "certificate": Certificate(solver="none", value=0, bound=None, gap=None, status="Test."),
        "predicted": None,
        "measured": None,
        "provenance": Provenance(profile=None, prompts=None, seed=0, versions=(), command=""),
    }


def test_weights_are_small_enough_for_git() -> None:
    folder = embedded_path("recall")
    assert folder is not None
    assert (folder / "model.safetensors").stat().st_size <= 12e6


def test_shipped_prompts_are_those_of_their_seeds_and_disjoint() -> None:
    files = {name: embedded_prompts("recall", name).read_text().splitlines() for name in SPLITS}
    for name in SPLITS:
        assert files[name] == [json.dumps(prompt) for prompt in records(name)]
    assert not set(files["calibration"]) & set(files["heldout"])


def test_a_question_inside_is_all_but_its_last_word_in_the_context(
    recall: Any, tmp_path: Path
) -> None:
    later = record(7, 400)
    inside, whole = loaded_prompts([asked(later), later], recall.tokenizer, tmp_path)
    (start, end), *_ = whole.answers
    assert inside.context == whole.context + whole.continuation[: start - 1]
    assert inside.continuation == whole.continuation[start - 1 : end + 1]
    assert inside.answers == ((1, 1 + end - start),)


def test_documents_have_the_length_asked_for() -> None:
    words, answers = document(random.Random(0), 77, Mixture())
    assert len(words) == len(answers) == 77
    assert words[0] == BOS


def test_prompts_are_refused_when_longer_than_the_model(recall: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("river " * 3000)
    with pytest.raises(InputError, match="model reads 2048"):
        load_prompts(path, recall.tokenizer, split=0.8, limit=None, longest=2048)
