"""Image tokens in plan files: optional, and asked for by what protects text from images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cacheplan.errors import ModelMismatchError, PlanError, UnsupportedError
from cacheplan.plans.check import check, check_model, check_runnable, kv_only
from cacheplan.plans.codec import decode, encode
from cacheplan.plans.io import read_plan
from cacheplan.types import Entry, KeyNorm, KVAction, KVPlan, LanguageSpec, Site, Trigger

GOLDEN = kv_only(read_plan(Path(__file__).with_name("golden_plan.json")), "test")


def protecting(model: LanguageSpec) -> KVPlan:
    action = KVAction(keep=0.5, scorer=KeyNorm(), protect_text=True)
    entries = tuple(Entry(site=Site(layer=layer), action=action) for layer in model.planned)
    return replace(GOLDEN, model=model, entries=entries, trigger=Trigger())


def test_models_of_text_alone_do_not_name_it() -> None:
    assert GOLDEN.model.image_token is None
    assert "image_token" not in encode(LanguageSpec, GOLDEN.model)
    seeing = replace(GOLDEN.model, image_token=7)
    written = encode(LanguageSpec, seeing)
    assert written["image_token"] == 7
    assert decode(LanguageSpec, written) == seeing


def test_plans_belong_to_one_image_token() -> None:
    seeing = replace(GOLDEN.model, image_token=7)
    check_model(replace(GOLDEN, model=seeing), seeing)
    with pytest.raises(ModelMismatchError, match="image token"):
        check_model(GOLDEN, seeing)


def test_rules() -> None:
    seeing = replace(GOLDEN.model, image_token=7)
    check(protecting(seeing))
    check_runnable(protecting(seeing))
    with pytest.raises(PlanError, match="protect_text is true, expected false"):
        check(protecting(GOLDEN.model))
    with pytest.raises(PlanError, match="image_token is -1"):
        check(protecting(replace(seeing, image_token=-1)))
    evicting = replace(protecting(seeing), trigger=Trigger(decode_every=4))
    with pytest.raises(UnsupportedError, match="protect_text"):
        check_runnable(evicting)
