"""A second diffusion model: a class-conditional DiT of patterns, trained to predict the noise.

Unlike the embedded one it reads a class instead of a text, has no cross-attention, predicts noise
on DDPM's levels and is sampled by DDIM.  Only the autoencoder is the embedded model's.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cacheplan.adapters.denoiser import load
from cacheplan.zoo.shapes.train import descend, paced, schedule

SIZE = 64  # pixels
PALETTES = (  # ink and paper, from 0 to 1
    ((0.9, 0.2, 0.2), (0.1, 0.1, 0.3)),
    ((0.2, 0.8, 0.4), (0.95, 0.95, 0.9)),
    ((0.95, 0.8, 0.2), (0.3, 0.1, 0.3)),
    ((0.3, 0.5, 0.9), (0.05, 0.05, 0.05)),
)
PATTERNS = ("checks", "rings", "waves", "dots")
CLASSES = len(PALETTES) * len(PATTERNS)
NULL = 1000  # the class of DiTPipeline's guidance
WIDTH, HEADS, BLOCKS = 96, 3, 6
BANK, BATCH, EMPTY = 4096, 48, 0.1
CALL = {"num_inference_steps": 24, "guidance_scale": 2.5}
SPLITS = {"calibration": (30_000, 16), "heldout": (40_000, 24)}  # first seed, pictures


def draw(classes: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures of the classes `[n]`, `[n, 3, SIZE, SIZE]` from -1 to 1."""
    n = len(classes)
    grid = torch.arange(SIZE) / SIZE
    y, x = torch.meshgrid(grid, grid, indexing="ij")

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    x, y = x - uniform(0.2, 0.8), y - uniform(0.2, 0.8)
    turn, periods = uniform(0, math.pi), uniform(3.0, 5.0)
    a, b = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    first, second = (2 * math.pi * periods * a).sin(), (2 * math.pi * periods * b).sin()
    radius = (x * x + y * y).sqrt()
    heights = (
        first * second,
        (2 * math.pi * periods * radius).sin(),
        (2 * math.pi * periods * (a + 0.1 * (2 * math.pi * 2 * b).sin())).sin(),
        0.5 * (first + second) - 0.35,
    )
    pattern = classes % len(PATTERNS)
    height = torch.stack(heights)[pattern, torch.arange(n)]
    ink = (0.5 + 4 * height).clamp(0, 1)[:, None]
    colours = torch.tensor(PALETTES)[classes // len(PATTERNS)][..., None, None]  # [n, 2, 3, 1, 1]
    return (colours[:, 1] * (1 - ink) + colours[:, 0] * ink) * 2 - 1


def transformer() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NULL,
    )


def train(out: Path, seed: int, minutes: float) -> None:
    """Write the pipeline, its prompts and how it is called into the folder `out`."""
    from diffusers import DDIMScheduler, DiTPipeline

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = load(None).vae
    scheduler = DDIMScheduler(clip_sample=False)
    classes = torch.randint(CLASSES, (BANK,), generator=generator)
    latents = _encoded(vae, classes, generator)
    denoiser = _trained(latents, classes, scheduler, 60 * minutes, generator)
    DiTPipeline(transformer=denoiser, vae=vae, scheduler=scheduler).save_pretrained(out)
    for name, (first, number) in SPLITS.items():
        lines = [
            json.dumps({"class_labels": [(i * 5 + first) % CLASSES], "seed": first + i})
            for i in range(number)
        ]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "call.json").write_text(json.dumps(CALL, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _encoded(vae: Any, classes: Tensor, generator: torch.Generator) -> Tensor:
    parts = [vae.encode(draw(c, generator)).latent_dist.mean for c in torch.split(classes, 128)]
    found: Tensor = torch.cat(parts) * vae.config.scaling_factor
    return found


def _trained(
    latents: Tensor, classes: Tensor, scheduler: Any, seconds: float, generator: torch.Generator
) -> Any:
    """Squared error of the noise at uniform levels; the weights kept are a moving average."""
    model = transformer().train()
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.01)
    for progress in paced(seconds, "DiT"):
        schedule(optimizer, 1.5e-3, progress)
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        empty = torch.rand(BATCH, generator=generator) < EMPTY
        labels = torch.where(empty, NULL, classes[rows])
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        level = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            noisy = scheduler.add_noise(clean, noise, level)
            found = model(noisy, timestep=level, class_labels=labels).sample
        progress.report(descend(model, optimizer, (found.float() - noise).square().mean()))
        keep = min(0.998, 1 - 1 / (1 + progress.step / 10))
        with torch.no_grad():
            for mean, now in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)
    return average
