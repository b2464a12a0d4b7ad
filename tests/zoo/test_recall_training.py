"""The training script makes the embedded model by default, and others when asked."""

from __future__ import annotations

import json
import random

import pytest
import torch

from cacheplan.zoo import embedded_path
from cacheplan.zoo.recall import train
from cacheplan.zoo.recall.grammar import BOS, WORDS, Mixture, invented_words


def test_the_default_is_the_embedded_model() -> None:
    folder = embedded_path("recall")
    assert folder is not None
    made = train.config(train.SHAPES["llama"], WORDS).to_dict()
    stored = json.loads((folder / "config.json").read_text())
    ways = {"architectures", "dtype", "transformers_version", "use_cache"}  # of saving, not sizes
    for name in stored.keys() - ways:
        assert made[name] == stored[name], name
    assert train.shortened(train.CURRICULUM, 4e6) == list(train.CURRICULUM)


@pytest.mark.parametrize("shape", train.SHAPES)
def test_tokens_are_words_of_the_language(shape: str) -> None:
    language = invented_words(2)
    stage = train.Stage(1e6, 64, Mixture(names=4, copied=0.5))
    ids, answered = train.batch(random.Random(0), stage, language)
    assert ids.shape == answered.shape == (train.BATCH_TOKENS // 64, 64)
    config = train.config(train.SHAPES[shape], language)
    assert int(ids.max()) < config.vocab_size == len(language.vocabulary)
    words = train.tokenizer(language)
    text = " ".join(language.vocabulary[int(i)] for i in ids[0, 1:])
    assert torch.equal(torch.tensor(words(text)["input_ids"]), ids[0])
    assert words.convert_ids_to_tokens([int(ids[0, 0])]) == [BOS]


def test_last_stages_can_be_shortened() -> None:
    found = train.shortened(train.CURRICULUM, 1.5e6)
    assert [stage.tokens for stage in found[-2:]] == [1.5e6, 1.5e6]
    assert found[:-2] == list(train.CURRICULUM[:-2])
