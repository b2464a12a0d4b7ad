"""Prompts with images, from a folder with a processor to profile, plan, verification and text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache
from typer.testing import CliRunner

from cacheplan import api
from cacheplan.adapters.images import call_arguments
from cacheplan.adapters.language import LanguageModel, load
from cacheplan.cli import app
from cacheplan.errors import InputError
from cacheplan.inputs import prompts_for
from cacheplan.profilers.prompts import digest
from cacheplan.recipes import RECIPES, candidates_for, seeing
from cacheplan.types import KVPlan, KVProfile

PATCHES = 9
invoke = CliRunner().invoke


def say(seed: int, words: int) -> str:
    order = np.random.default_rng(seed).permutation(np.arange(2, 90))[:words]
    return " ".join(f"w{word}" for word in order)


@pytest.fixture(scope="module")
def folder(tiny_vision: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pictures, and prompts with and without them."""
    path: Path = tmp_path_factory.mktemp("vision")
    tiny_vision.save_llava(path / "model")
    noise = np.random.default_rng(0).integers(0, 255, (3, 14, 20, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(path / f"{i}.png")
    lines = [
        {
            "image": "0.png",
            "context": f"{say(1, 8)} <image> {say(2, 20)}",
            "continuation": say(3, 8),
        },
        {"text": say(4, 40)},
        {"image": "1.png", "text": say(5, 40)},
    ]
    (path / "calibration.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{"image": "2.png", "text": say(6, 40)}, {"text": say(7, 40)}]
    (path / "heldout.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LanguageModel:
    return load(str(folder / "model"))


@pytest.fixture(scope="module")
def profile(folder: Path) -> KVProfile:
    found = api.profile(
        str(folder / "model"),
        out=folder / "profile.safetensors",
        prompts=folder / "calibration.jsonl",
        ablate=3,
    )
    assert isinstance(found, KVProfile)
    return found


def test_a_model_that_sees_is_loaded_with_its_processor(loaded: LanguageModel) -> None:
    assert type(loaded.model).__name__ == "LlavaForConditionalGeneration"
    assert loaded.processor is not None
    assert loaded.spec.image_token == 90
    assert loaded.tokenizer("w5 w7")["input_ids"] == [5, 7]


def test_prompts_hold_their_images(folder: Path, loaded: LanguageModel) -> None:
    first, second, third = prompts_for(loaded, folder / "calibration.jsonl", "x", 0.8, None)
    assert len(first.context) == 8 + PATCHES + 20
    assert first.context[8 : 8 + PATCHES] == (90,) * PATCHES
    assert len(first.continuation) == 8
    assert second.images is None
    assert third.context[:PATCHES] == (90,) * PATCHES, "an image without a place comes first"
    assert third.images is not None
    assert first.images is not None
    assert third.images.whole["pixel_values"].shape == (1, 3, 12, 12)
    assert not torch.equal(*(p.images.whole["pixel_values"] for p in (first, third)))  # type: ignore[union-attr]
    same = third.__class__(third.context, third.continuation, images=first.images)
    assert digest([third]) != digest([same]), "the picture counts too"


def test_image_statistics_are_those_of_the_attention(
    folder: Path, loaded: LanguageModel, profile: KVProfile
) -> None:
    """Against attention matrices of transformers' eager attention."""
    shares, masses = [], []
    model = loaded.model
    model.set_attn_implementation("eager")
    try:
        for prompt in prompts_for(loaded, folder / "calibration.jsonl", "x", 0.8, None):
            if prompt.images is None:
                continue
            ids, C = torch.tensor([prompt.context + prompt.continuation]), len(prompt.context)
            beside = call_arguments(model, prompt.images, 0, ids.shape[1])
            with torch.no_grad():
                found = model(input_ids=ids, output_attentions=True, **beside).attentions
            own = ids[0, :C] == 90
            late = torch.stack(found)[:, 0, :, C:, :C].double()  # [L, H, T, C]
            masses.append(late[..., own].sum((1, 2, 3)) / late.sum((1, 2, 3)))
            shares.append(float(own.double().mean()))
    finally:
        model.set_attn_implementation("sdpa")
    assert profile.statistics["image_share"].mean == pytest.approx(np.mean(shares))
    expected = torch.stack(masses).mean(0).numpy()
    np.testing.assert_allclose(profile.statistics["image_mass"].mean, expected, rtol=1e-4)
    assert profile.statistics["image_mass"].count == 2
    assert profile.statistics["damage"].count == 3


def test_only_models_that_see_choose_text_before_images(profile: KVProfile) -> None:
    protected = [c for c in profile.candidates if c.protect_text]
    assert protected
    blind = replace(profile.model, image_token=None)
    assert not any(c.protect_text for c in candidates_for(blind, RECIPES.values()))
    damage = profile.statistics["damage"].mean
    for candidate in (c for c in protected if c.recent < 16):
        free = profile.candidates.index(replace(candidate, protect_text=False))
        own = damage[:, :, profile.candidates.index(candidate)]
        assert not np.allclose(own, damage[:, :, free]), "the prior changes what stays"
    menu = seeing(RECIPES["planned"], profile.model).candidates
    assert set(protected) < set(menu)


def test_plan_verify_and_generate(folder: Path, profile: KVProfile) -> None:
    plan = api.solve(profile, budget=0.4)
    assert isinstance(plan, KVPlan)
    assert plan.model.image_token == 90
    found = api.verify(plan, prompts=folder / "heldout.jsonl")
    assert found.damage.prompts == 2
    assert found.measured_bytes == found.planned_bytes < found.full_bytes
    full = api.solve(profile, budget=1.0)
    assert api.verify(full, prompts=folder / "heldout.jsonl").damage.kl < 1e-6
    text = api.generate(
        plan, prompt=f"w3 <image> {say(8, 20)}", image=folder / "2.png", max_new_tokens=5
    )
    assert text.prompt_tokens == 1 + PATCHES + 20
    assert text.new_tokens == 5
    assert text.measured_bytes == text.planned_bytes
    with pytest.raises(InputError, match="without words"):
        api.generate(plan, image=folder / "2.png")


def test_the_image_is_seen_under_the_plan(
    loaded: LanguageModel, folder: Path, profile: Any
) -> None:
    full = api.solve(profile, budget=1.0)
    prompt = f"{say(9, 10)} <image> w5"
    seen = []
    for number in (0, 1):
        text = api.generate(full, prompt=prompt, image=folder / f"{number}.png", max_new_tokens=6)
        inputs = loaded.processor(
            images=Image.open(folder / f"{number}.png").convert("RGB"), text=prompt,
            return_tensors="pt",
        )  # fmt: skip
        stock = loaded.model.generate(
            **inputs, max_new_tokens=6, do_sample=False, past_key_values=DynamicCache()
        )
        words = loaded.tokenizer.decode(stock[0, -6:], skip_special_tokens=True)
        assert text.text.split() == words.split()
        seen.append(words)
    assert seen[0] != seen[1]


def test_commands_name_images(folder: Path, profile: KVProfile) -> None:
    shown = invoke(app, ["show", str(folder / "profile.safetensors")])
    assert shown.exit_code == 0, shown.output
    assert "images are" in shown.output
    facts = json.loads(invoke(app, ["show", str(folder / "profile.safetensors"), "--json"]).stdout)
    assert len(facts["image_mass"]) == 2
    plan = folder / "plan.json"
    solved = invoke(
        app, ["solve", str(folder / "profile.safetensors"), "--budget", "0.5", "-o", str(plan)]
    )
    assert solved.exit_code == 0, solved.output
    ran = invoke(
        app,
        ["run", "--plan", str(plan), "--image", str(folder / "0.png"), "-p", say(1, 9), "-n", "4"],
    )
    assert ran.exit_code == 0, ran.output
    assert len(ran.stdout.split()) <= 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"image": "none.png", "text": "TEXT"}, "cannot be read"),
        ({"image": "calibration.jsonl", "text": "TEXT"}, "is no image"),
        ({"image": "0.png", "text": "TEXT <image>"}, "after the context"),
        ({"image": 5, "text": "TEXT"}, '"image" must be a string'),
        ({"image": "0.png"}, "must be an object"),
    ],
)
def test_prompts_that_cannot_be_shown(
    folder: Path, loaded: LanguageModel, line: dict[str, Any], words: str
) -> None:
    if "text" in line:
        line = {**line, "text": line["text"].replace("TEXT", say(3, 60))}
    (folder / "bad.jsonl").write_text(json.dumps(line))
    with pytest.raises(InputError, match=words):
        prompts_for(loaded, folder / "bad.jsonl", "x", 0.8, None)


def test_models_of_text_alone_refuse_images(folder: Path) -> None:
    with pytest.raises(InputError, match="no processor"):
        prompts_for(load(None), folder / "heldout.jsonl", "x", 0.8, None)
