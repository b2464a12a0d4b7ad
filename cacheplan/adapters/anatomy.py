"""Where the blocks and parts of a denoiser are, by the names diffusers gives them."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from cacheplan.adapters.calls import unwrapped
from cacheplan.errors import UnsupportedError

BLOCKS = re.compile(r"(.+_)?(blocks|layers)$")
# lists that run before or beside the main stream
ASIDE = re.compile(r"refine|text|txt|caption|context|control|vace|res_blocks|face|motion")
PARTS = {
    "attn": "attention",
    "attn1": "attention",
    "attention": "attention",
    "self_attn": "attention",
    "self_attention": "attention",
    "attn2": "cross_attention",
    "cross_attn": "cross_attention",
    "cross_attention": "cross_attention",
    "ff": "mlp",
    "ffn": "mlp",
    "mlp": "mlp",
    "img_mlp": "mlp",
    "feed_forward": "mlp",
    "ff_context": "mlp_context",
    "txt_mlp": "mlp_context",
}
OF_TEXT = ("to_k", "to_v", "add_k_proj", "add_v_proj")  # of a cross-attention


def is_unet(denoiser: nn.Module) -> bool:
    return hasattr(denoiser, "down_blocks") and hasattr(denoiser, "up_blocks")


def block_paths(denoiser: nn.Module) -> list[str]:
    """Paths of what may be a block; which of them run, and in which order, shows when they do."""
    denoiser = unwrapped(denoiser)
    if is_unet(denoiser):
        unet: Any = denoiser
        down, up = len(unet.down_blocks), len(unet.up_blocks)
        mid = ["mid_block"] if getattr(denoiser, "mid_block", None) is not None else []
        downs, ups = (
            [f"down_blocks.{i}" for i in range(down)],
            [f"up_blocks.{i}" for i in range(up)],
        )
        return [*downs, *mid, *ups]
    paths = [
        f"{name}.{index}"
        for name, child in denoiser.named_children()
        if isinstance(child, nn.ModuleList) and BLOCKS.match(name) and not ASIDE.search(name)
        for index in range(len(child))
    ]
    if not paths:
        raise UnsupportedError(
            f"{type(denoiser).__name__} has no list of blocks that is known here "
            "(transformer_blocks, blocks, layers), so its features cannot be planned."
        )
    return paths


def part_paths(denoiser: nn.Module, block: str) -> dict[str, str]:
    """Path of each part relative to its block, with what kind of part its name says."""
    if is_unet(denoiser):
        return {}
    module: Any = denoiser.get_submodule(block)
    # HiDream's blocks hold the real one as their only child, "block"
    inside = "block." if isinstance(getattr(module, "block", None), nn.Module) else ""
    module = module.block if inside else module
    return {inside + name: PARTS[name] for name, _ in module.named_children() if name in PARTS}


def text_projections(denoiser: nn.Module, part: str) -> list[str]:
    """What a cross-attention at the path `part` may make of the text alone, relative to it.

    Only plain linear layers; whether what they make stays the same shows in runs.
    """
    children = denoiser.get_submodule(part).named_children()
    return [name for name, child in children if name in OF_TEXT and type(child) is nn.Linear]


def left_out(unet: nn.Module) -> list[str]:
    """Blocks of a UNet that a step leaves out when it keeps the branch, in order of execution.

    All but the first down and the last up block (DeepCache, arXiv 2312.00858); the output of the
    last one listed is the branch.  The others may return anything of the right shape: nothing
    of them is read, because the skip connections of the last up block come from the input and
    from the first down block.
    """
    unet = unwrapped(unet)
    up, down = (list(getattr(unet, name, ())) for name in ("up_blocks", "down_blocks"))
    if len(up) < 2 or len(getattr(up[-1], "resnets", ())) != 1 + len(
        getattr(down[0], "resnets", ())
    ):
        raise UnsupportedError(
            f"{type(unet).__name__} is not a UNet whose last up block reads only the first down "
            "block's skip connections, so its branch cannot be kept."
        )
    return block_paths(unet)[1:-1]
