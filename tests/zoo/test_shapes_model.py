"""The embedded diffusion model: its pictures, its prompts, its size."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from cacheplan.adapters.denoiser import load
from cacheplan.zoo import embedded_call, embedded_path, embedded_prompts
from cacheplan.zoo.shapes.drawing import BACKGROUNDS, COLOURS, WORDS, draw, random_scene
from cacheplan.zoo.shapes.make_prompts import CALL, SPLITS, lines

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load(None, device="cpu")


def test_the_folder_is_small() -> None:
    folder = embedded_path("shapes")
    assert folder is not None
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    assert sum(sizes) <= 12 * MEGABYTE


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_what_the_script_writes(split: str) -> None:
    text = embedded_prompts("shapes", split).read_text(encoding="utf-8")
    assert text.splitlines() == lines(*SPLITS[split])
    assert embedded_call("shapes") == CALL


def test_calibration_and_held_out_noise_differ() -> None:
    seeds = [
        {
            json.loads(line)["seed"]
            for line in embedded_prompts("shapes", split).read_text().split("\n")[:-1]
        }
        for split in SPLITS
    ]
    assert not seeds[0] & seeds[1]


def test_every_prompt_is_in_the_vocabulary(pipe: Any) -> None:
    unknown = pipe.tokenizer.unk_token_id
    scene = random_scene(200, torch.Generator().manual_seed(1))
    ids = pipe.tokenizer(scene.prompts()).input_ids
    assert not any(unknown in row for row in ids)
    assert len(pipe.tokenizer) == len(WORDS) + 3


def nearest(colour: Tensor, named: dict[str, tuple[float, float, float]]) -> str:
    distance = {name: float((colour - torch.tensor(rgb)).norm()) for name, rgb in named.items()}
    return min(distance, key=lambda name: distance[name])


def described(picture: Tensor, background: str) -> tuple[str, str]:
    """Colour and background that a picture `[H, W, 3]` shows, values from 0 to 1."""
    edge = torch.cat([picture[0], picture[-1], picture[:, 0], picture[:, -1]]).median(0).values
    away = (picture - torch.tensor(BACKGROUNDS[background])).norm(dim=-1).flatten()
    ink = picture.reshape(-1, 3)[away.topk(200).indices].median(0).values
    return nearest(ink, COLOURS), nearest(edge, BACKGROUNDS)


def test_the_script_draws_what_prompts_say() -> None:
    generator = torch.Generator().manual_seed(2)
    scene = random_scene(40, generator)
    pictures = (draw(scene, generator) / 2 + 0.5).permute(0, 2, 3, 1)
    for prompt, picture in zip(scene.prompts(), pictures, strict=True):
        if "striped" not in prompt:
            words = prompt.split()
            assert described(picture, words[-1]) == (words[-4], words[-1])


def test_the_model_draws_the_colours_it_is_asked_for(pipe: Any) -> None:
    scene = random_scene(60, torch.Generator().manual_seed(3))
    prompts = [p for p in scene.prompts() if "striped" not in p][:12]
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        prompts, generator=torch.Generator().manual_seed(0), output_type="np", **CALL
    ).images
    right = 0
    for prompt, picture in zip(prompts, torch.from_numpy(made), strict=True):
        words = prompt.split()
        right += described(picture, words[-1]) == (words[-4], words[-1])
    assert right >= 11, right
