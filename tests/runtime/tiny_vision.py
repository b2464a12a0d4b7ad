"""Tiny vision-language models with random weights, and conversations of text and images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY, WINDOW, PATCHES = 97, 24, 9  # tokens per image
IMAGE, START, END = 90, 91, 92  # token ids that no text uses

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Turn:
    """New tokens `[1, T]` and the images among them."""

    ids: Tensor
    images: int
    seed: int


def _llava() -> Any:
    return transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )


def _gemma3() -> Any:
    layers = {"num_hidden_layers": 4, "sliding_window": WINDOW}
    layers["layer_types"] = ["sliding_attention", "full_attention"] * 2  # type: ignore[assignment]
    return transformers.Gemma3Config(
        text_config={**TEXT, **layers},
        vision_config={"vision_use_head": False, **VISION},
        mm_tokens_per_image=PATCHES,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def _qwen() -> Any:
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rotary},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 8,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=93,
    )


CONFIGS = {"llava": _llava, "gemma3": _gemma3, "qwen2.5-vl": _qwen}


def build(name: str) -> Any:
    config = CONFIGS[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForImageTextToText.from_config(
            config, attn_implementation="sdpa"
        ).eval()


def turn(seed: int, words: int, images: int) -> Turn:
    """Text with images in it: words, an image, words ...; every word is another."""
    generator = torch.Generator().manual_seed(seed)
    text = (torch.randperm(88, generator=generator) + 2)[:words].tolist()
    ids: list[int] = []
    for i in range(images):
        share = text[i * 4 : i * 4 + 4]
        ids += [*share, START, *[IMAGE] * PATCHES, END]
    return Turn(torch.tensor([ids + text[images * 4 :]]), images, seed)


def inputs(name: str, model: Any, turns: list[Turn], new: int | None = None) -> dict[str, Tensor]:
    """Arguments of a forward call that reads the last `new` of the turns (None: all).

    Positions are those in the whole conversation.
    """
    ids = torch.cat([t.ids for t in turns], 1)
    fresh = turns if new is None else turns[-new:]
    length = sum(t.ids.shape[1] for t in fresh)
    found = {"input_ids": ids[:, -length:]}
    kinds = (ids == IMAGE).long()
    pictures = sum(t.images for t in fresh)
    if name == "gemma3" and pictures:
        found["token_type_ids"] = kinds
    if name == "qwen2.5-vl":
        every = sum(t.images for t in turns)
        grid = torch.tensor([[1, 6, 6]])
        place, _ = model.model.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=grid.repeat(every, 1) if every else None
        )
        found["position_ids"] = place[..., -length:]
        if pictures:
            found["image_grid_thw"] = grid.repeat(pictures, 1)
            found["pixel_values"] = torch.cat([pixels(name, t) for t in fresh])
    else:
        found["position_ids"] = torch.arange(ids.shape[1])[None, -length:]
        if pictures:
            found["pixel_values"] = torch.cat([pixels(name, t) for t in fresh])
    return found


def pixels(name: str, turn: Turn) -> Tensor:
    """The turn's images as the model wants them: whole, or as a list of patches."""
    generator = torch.Generator().manual_seed(1000 + turn.seed)
    if name == "qwen2.5-vl":
        return torch.randn(turn.images * 36, 3 * 2 * 4 * 4, generator=generator)
    return torch.randn(turn.images, 3, 12, 12, generator=generator)


def images(ids: Tensor) -> Tensor:
    """The number of the image that each token `[T]` belongs to, -1 for text."""
    own = ids[0] == IMAGE
    starts = own & ~torch.cat([torch.zeros(1, dtype=torch.bool), own[:-1]])
    return torch.where(own, starts.cumsum(0) - 1, -1)


def save_llava(folder: Any) -> None:
    """A model with tokenizer and processor; words are w2 to w88, and <image> stands for one."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers

    names = ["<pad>", "<s>", *(f"w{i}" for i in range(2, IMAGE)), "<image>", "<start>", "<end>"]
    words = Words(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    size = {"height": 12, "width": 12}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    model = build("llava")
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
