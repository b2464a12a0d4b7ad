"""Train the embedded diffusion model and write it as an ordinary `diffusers` pipeline folder.

    python -m cacheplan.zoo.shapes.train OUT [--seed 0] [--minutes 50] [--start FOLDER]

First a small autoencoder of the pictures, then a text encoder and a PixArt transformer on its
latents, by flow matching (Lipman et al. 2022, arXiv 2210.02747): with noise e and picture x, the
transformer sees `(1 - s) x + s e` and predicts `e - x`; one prompt in ten is empty, for guidance.
The whole takes about 50 minutes on two CPU cores that know bfloat16.  `--start` goes on from a
folder that this script has written: its autoencoder stays, the rest is trained further.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cacheplan.zoo.shapes.drawing import WORDS, draw, random_scene

WIDTH, HEADS, BLOCKS = 128, 4, 8
TEXT_WIDTH, TEXT_LENGTH = 64, 12
CHANNELS = 4  # of a latent, 16 x 16
BANK = 24_576  # pictures drawn and encoded once
BATCH = 64
PICTURES = 16  # in a batch of the autoencoder
EMPTY = 0.1  # share of prompts left out


def autoencoder() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def transformer() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=BLOCKS,
        cross_attention_dim=WIDTH,
        sample_size=16,
        patch_size=2,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )


def text_encoder() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=3 + len(WORDS),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        is_gated_act=False,
        feed_forward_proj="relu",
    )
    return T5EncoderModel(config)


def tokenizer() -> Any:
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    words = [(f"▁{word}", 0.0) for word in WORDS]
    return T5Tokenizer(vocab=special + words, extra_ids=0, model_max_length=TEXT_LENGTH)


def scheduler() -> Any:
    """The first order of DPM-Solver++ on flow-matching noise levels: Euler's method."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        solver_order=1,
        flow_shift=1.0,
    )


def train_autoencoder(seconds: float, generator: torch.Generator) -> Any:
    """Squared and absolute error of the picture, and a light pull of latents to a unit normal."""
    model = autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for progress in paced(seconds, "autoencoder"):
        schedule(optimizer, 2e-3, progress)
        pictures = draw(random_scene(PICTURES, generator), generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(pictures.contiguous(memory_format=torch.channels_last))
            latent = posterior.latent_dist.sample(generator=generator)
            made = model.decode(latent).sample
        error = made.float() - pictures
        kl = posterior.latent_dist.kl().mean() / latent[0].numel()
        loss = error.square().mean() + 0.3 * error.abs().mean() + 1e-4 * kl
        progress.report(descend(model, optimizer, loss))
    return model.eval()


@torch.no_grad()
def encode_bank(model: Any, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    latents, prompts = [], []
    for _ in range(BANK // 128):
        scene = random_scene(128, generator)
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(model.encode(draw(scene, generator)).latent_dist.mean.float())
        prompts += scene.prompts()
    return torch.cat(latents), prompts


def train_denoiser(
    denoiser: Any,
    reader: Any,
    latents: Tensor,
    prompts: list[str],
    seconds: float,
    peak: float,
    generator: torch.Generator,
    out: Any,
) -> tuple[Any, Any]:
    """Flow matching with logit-normal noise levels; the weights kept are a moving average."""
    words = tokenizer()
    coded = words([*prompts, ""], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    ids, masks = coded.input_ids, coded.attention_mask
    both = torch.nn.ModuleList([denoiser, reader])
    average = copy.deepcopy(both)
    optimizer = torch.optim.AdamW(both.parameters(), lr=peak, weight_decay=0.01)
    for progress in paced(seconds, "transformer"):
        schedule(optimizer, peak, progress)
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        empty = torch.rand(BATCH, generator=generator) < EMPTY
        text = torch.where(empty, len(prompts), rows)
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        level = torch.sigmoid(torch.randn(BATCH, generator=generator))
        at = level.view(-1, 1, 1, 1)
        # on CPUs the fused attention's backward pass is slower than plain matrix products
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            states = reader(ids[text], attention_mask=masks[text]).last_hidden_state
            found = denoiser(
                (1 - at) * clean + at * noise,
                encoder_hidden_states=states,
                encoder_attention_mask=masks[text],
                timestep=level * 1000,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
        loss = (found.float() - (noise - clean)).square().mean()
        progress.report(descend(both, optimizer, loss))
        keep = min(0.999, 1 - 1 / (1 + progress.step / 10))
        with torch.no_grad():
            for mean, now in zip(average.parameters(), both.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)
        if progress.step % 1000 == 999:
            out(average[0].eval(), average[1].eval())
    return average[0].eval(), average[1].eval()


class Progress:
    """Where a timed training is: `share` of its time, `step`, and a line now and then."""

    def __init__(self, name: str) -> None:
        self.name, self.share, self.step, self.loss = name, 0.0, 0, 0.0
        self.start = time.monotonic()

    def report(self, loss: float) -> None:
        self.loss = loss if self.step == 0 else 0.99 * self.loss + 0.01 * loss
        if self.step % 100 == 0:
            took = time.monotonic() - self.start
            print(f"{self.name} step {self.step} {took:.0f}s loss {self.loss:.4f}", flush=True)


def paced(seconds: float, name: str) -> Any:
    progress = Progress(name)
    while progress.share < 1:
        yield progress
        progress.step += 1
        progress.share = (time.monotonic() - progress.start) / seconds


def schedule(optimizer: Any, peak: float, progress: Progress) -> None:
    for group in optimizer.param_groups:
        warm = min(1.0, (progress.step + 1) / 200)
        group["lr"] = peak * warm * (0.5 + 0.5 * math.cos(math.pi * progress.share)) + 1e-5


def descend(model: Any, optimizer: Any, loss: Tensor) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def pipeline(vae: Any, denoiser: Any, reader: Any) -> Any:
    from diffusers import PixArtAlphaPipeline

    return PixArtAlphaPipeline(
        tokenizer=tokenizer(),
        text_encoder=reader,
        vae=vae,
        transformer=denoiser,
        scheduler=scheduler(),
    )


def filled(fresh: Any, trained: Any) -> Any:
    """A new module, which knows no folder it came from, with trained weights."""
    fresh.load_state_dict(trained.state_dict())
    return fresh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=50.0, help="for everything")
    parser.add_argument("--start", type=Path, help="a folder to go on from")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    seconds = 60 * arguments.minutes
    if arguments.start is None:
        vae = train_autoencoder(0.16 * seconds, generator)
        denoiser, reader, peak = transformer(), text_encoder(), 1.2e-3
        seconds *= 0.84
    else:
        from diffusers import PixArtAlphaPipeline

        made, peak = PixArtAlphaPipeline.from_pretrained(arguments.start), 6e-4
        vae = filled(autoencoder(), made.vae).eval()
        vae.register_to_config(scaling_factor=made.vae.config.scaling_factor)
        denoiser, reader = (
            filled(transformer(), made.transformer),
            filled(text_encoder(), made.text_encoder),
        )
    latents, prompts = encode_bank(vae, generator)
    if arguments.start is None:
        vae.register_to_config(scaling_factor=1 / float(latents.std()))

    def write(denoiser: Any, reader: Any) -> None:
        pipeline(vae, denoiser, reader).save_pretrained(arguments.out)

    scaled = latents * vae.config.scaling_factor
    trained = train_denoiser(denoiser, reader, scaled, prompts, seconds, peak, generator, write)
    write(*trained)


if __name__ == "__main__":
    main()
