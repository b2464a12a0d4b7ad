"""Random diffusers pipelines of a few thousand weights, with real schedulers and no text encoders.

Each builder returns a pipeline and the keyword arguments of one short call: six steps, prompt
embeddings instead of prompts, latents as output.  Guidance is batched, called twice or distilled,
as in the family's real pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

STEPS = 6
Tiny = tuple[Any, dict[str, Any]]
BUILDERS: dict[str, Callable[[], Tiny]] = {}


def builder(build: Callable[[], Tiny]) -> Callable[[], Tiny]:
    BUILDERS[build.__name__] = build
    return build


def build(name: str) -> Tiny:
    """Build one pipeline; the same weights every time, and the caller's random state untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe, call = BUILDERS[name]()
        pipe.set_progress_bar_config(disable=True)
        return pipe, {"num_inference_steps": STEPS, **call}


@torch.no_grad()
def random_weights(model: Any) -> Any:
    """Weights that keep activations near 1, also in layers that training starts at zero."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            fan_in = weight[0].numel() if "embed" not in name else weight.shape[-1]
            weight.normal_(std=min(0.3, fan_in**-0.5))
        elif "norm" in name and name.endswith("weight"):
            weight.normal_(1.0, 0.1)
        else:
            weight.normal_(std=0.1)
    return model.eval()


def text(*, masks: bool = False, pooled: bool = False, guided: bool = True) -> dict[str, Any]:
    """Embeddings of a prompt, and of a negative one if guidance is to run."""
    given: dict[str, Any] = {}
    for sign in ("", "negative_") if guided else ("",):
        given[f"{sign}prompt_embeds"] = torch.randn(1, 5, 24)
        if masks:
            given[f"{sign}prompt_attention_mask"] = torch.ones(1, 5, dtype=torch.long)
        if pooled:
            given[f"{sign}pooled_prompt_embeds"] = torch.randn(1, 20)
    return given


def image(size: int = 64, **options: Any) -> dict[str, Any]:
    return {"height": size, "width": size, "output_type": "latent", **options}


def video(size: int = 32, frames: int = 5) -> dict[str, Any]:
    return image(size, num_frames=frames)


def without(names: str) -> dict[str, None]:
    """Components that a call with embeddings and latents does without."""
    return dict.fromkeys(names.split())


def flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


@builder
def pixart() -> Tiny:
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        caption_channels=24,
        cross_attention_dim=32,
        use_additional_conditions=False,
    )
    pipe = diffusers.PixArtAlphaPipeline(
        transformer=random_weights(model),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        **without("tokenizer text_encoder vae"),
    )
    options: dict[str, Any] = {"negative_prompt": None, "use_resolution_binning": False}
    return pipe, {**text(masks=True), **image(**options)}


@builder
def flux() -> Tiny:
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = diffusers.FluxPipeline(
        scheduler=flow(),
        transformer=random_weights(model),
        **without("vae text_encoder tokenizer text_encoder_2 tokenizer_2"),
    )
    return pipe, {**text(pooled=True, guided=False), **image()}


@builder
def flux2() -> Tiny:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    pipe = diffusers.Flux2Pipeline(
        scheduler=flow(),
        transformer=random_weights(model),
        **without("vae text_encoder tokenizer"),
    )
    return pipe, {**text(guided=False), **image()}


def wan_model() -> Any:
    return random_weights(
        diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=24,
            freq_dim=16,
            ffn_dim=48,
            num_layers=3,
            rope_max_seq_len=32,
        )
    )


@builder
def wan() -> Tiny:
    pipe = diffusers.WanPipeline(
        transformer=wan_model(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **without("tokenizer text_encoder vae"),
    )
    return pipe, {**text(), **video()}


@builder
def wan_experts() -> Tiny:
    pipe = diffusers.WanPipeline(
        transformer=wan_model(),
        transformer_2=wan_model(),
        boundary_ratio=0.7,
        scheduler=flow(shift=2.0),
        **without("tokenizer text_encoder vae"),
    )
    return pipe, {**text(), **video()}


@builder
def sd3() -> Tiny:
    return sd3_pipeline()


@builder
def sd35() -> Tiny:
    """As SD3, with a second self-attention in the first block."""
    return sd3_pipeline(dual_attention_layers=(0,), qk_norm="rms_norm")


def sd3_pipeline(**options: Any) -> Tiny:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        **options,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=random_weights(model),
        scheduler=flow(shift=3.0),
        **without(
            "vae text_encoder tokenizer text_encoder_2 tokenizer_2 text_encoder_3 tokenizer_3"
        ),
    )
    return pipe, {**text(pooled=True), **image()}


@builder
def stable_diffusion() -> Tiny:
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    pipe = diffusers.StableDiffusionPipeline(
        unet=random_weights(model),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
        ),
        requires_safety_checker=False,
        **without("vae text_encoder tokenizer safety_checker feature_extractor"),
    )
    return pipe, {**text(), **image()}


@builder
def cogvideox() -> Tiny:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=3,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        patch_size=2,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    )
    pipe = diffusers.CogVideoXPipeline(
        transformer=random_weights(model),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        **without("tokenizer text_encoder vae"),
    )
    return pipe, {**text(), **video()}


@builder
def hunyuan_video() -> Tiny:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        patch_size=2,
        text_embed_dim=24,
        pooled_projection_dim=20,
        rope_axes_dim=(4, 6, 6),
    )
    pipe = diffusers.HunyuanVideoPipeline(
        transformer=random_weights(model),
        scheduler=flow(shift=7.0),
        **without("text_encoder tokenizer vae text_encoder_2 tokenizer_2"),
    )
    return pipe, {**text(masks=True, pooled=True, guided=False), **video()}


@builder
def ltx() -> Tiny:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=24,
    )
    pipe = diffusers.LTXPipeline(
        scheduler=flow(),
        transformer=random_weights(model),
        **without("vae text_encoder tokenizer"),
    )
    return pipe, {**text(masks=True), **video(64, 9)}


@builder
def qwen_image() -> Tiny:
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = diffusers.QwenImagePipeline(
        scheduler=flow(),
        transformer=random_weights(model),
        **without("vae text_encoder tokenizer"),
    )
    given = text()
    # of another length than the prompt, as in reality
    given["negative_prompt_embeds"] = given["negative_prompt_embeds"][:, :4]
    for sign in ("", "negative_"):
        length = given[f"{sign}prompt_embeds"].shape[1]
        given[f"{sign}prompt_embeds_mask"] = torch.ones(1, length, dtype=torch.long)
    return pipe, {**given, **image()}


@builder
def sana() -> Tiny:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=4,
    )
    pipe = diffusers.SanaPipeline(
        transformer=random_weights(model),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **without("tokenizer text_encoder vae"),
    )
    options: dict[str, Any] = {"negative_prompt": None, "use_resolution_binning": False}
    return pipe, {**text(masks=True), **image(128, **options)}


@builder
def dit() -> Tiny:
    """Class-conditional; the pipeline always decodes, so it gets a small real autoencoder."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1
    )
    pipe = diffusers.DiTPipeline(
        transformer=random_weights(model), vae=vae.eval(), scheduler=diffusers.DDIMScheduler()
    )
    return pipe, {"class_labels": [3], "guidance_scale": 2.0, "output_type": "pt"}
