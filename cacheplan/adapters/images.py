"""Prompts with images: what a processor makes of them, cut to the tokens of one call."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cacheplan.adapters.decoder import text_decoder
from cacheplan.adapters.offloading import input_device
from cacheplan.errors import InputError, UnsupportedError


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one text: arguments of the model's call beside its token ids.

    `whole` belong to the images (pixels, grids); `kinds` `[1, S]` say something of each token.
    `digest` is that of the image's file.
    """

    whole: dict[str, Tensor]
    kinds: dict[str, Tensor] = field(default_factory=dict)
    digest: str = ""


def read_image_text(processor: Any, text: str, image: Path) -> tuple[list[int], Images]:
    """Token ids of `text` with the image in it, and what the model needs to see it.

    The image stands where the text has the processor's own sign for images.  A text without one
    becomes the user's message after the image in the model's chat template, or follows the image
    where there is none.  Raises InputError for files that are no images and for processors whose
    packages are missing.
    """
    if processor is None:
        raise InputError(
            f"The image {image} was given, but the model has no processor of images that can be "
            "loaded here: give a vision-language model, and install what its processor needs "
            "(pillow, often torchvision)."
        )
    sign = processor.image_token
    if sign not in text:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        else:
            text = sign + text
    found = processor(images=_open(image), text=text, return_tensors="pt")
    ids = found.pop("input_ids")
    found.pop("attention_mask", None)
    kinds = {name: value for name, value in found.items() if value.shape == ids.shape}
    whole = {name: value for name, value in found.items() if name not in kinds}
    return ids[0].tolist(), Images(whole, kinds, hashlib.sha256(image.read_bytes()).hexdigest())


def call_arguments(model: Any, images: Images | None, start: int, end: int) -> dict[str, Any]:
    """What a call that reads the tokens from `start` to `end` needs beside their ids.

    Only a call from the start sees the images.  A text without any gets its positions, since a
    vision-language model may remember those of an earlier text with images.
    """
    device = input_device(model)
    if images is not None:
        if start > 0:
            return {}
        cut = {name: value[:, :end] for name, value in _stretched(images.kinds, end).items()}
        return {name: value.to(device) for name, value in (images.whole | cut).items()}
    if image_token(model.config) is None:
        return {}
    return {"position_ids": torch.arange(start, end, device=device)[None]}


def read(model: Any, ids: Tensor, cache: Any, images: Images | None = None) -> Mapping[str, Any]:
    """Let the decoder read tokens `[1, T]` and their images into an empty cache.

    Returns the arguments that the decoder got.  The logits of a whole prompt are never made.
    """
    decoder, got = text_decoder(model), dict[str, Any]()

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        got.update(kwargs)

    hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
    arguments = call_arguments(model, images, 0, ids.shape[1])
    if images is not None:
        decoder, arguments = model, {**arguments, "logits_to_keep": 1}
    try:
        decoder(input_ids=ids, past_key_values=cache, use_cache=True, **arguments)
    finally:
        hook.remove()
    return got


def image_token(config: Any) -> int | None:
    """The token id that stands for (a part of) an image; None for models of text alone."""
    if getattr(config, "vision_config", None) is None:
        return None
    found = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if not isinstance(found, int):
        raise UnsupportedError(
            f"{type(config).__name__} does not say which token stands for an image, so plans "
            "cannot tell images from text."
        )
    return found


def _stretched(kinds: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """With zeros, the kind of text, for the tokens that follow."""
    return {
        name: torch.cat([value, value.new_zeros(1, max(0, length - value.shape[1]))], dim=1)
        for name, value in kinds.items()
    }


def _open(path: Path) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise InputError("Images need the package pillow: run `pip install pillow`.") from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is no image: give a PNG or JPEG file.") from error
    except OSError as error:
        reason = error.strerror or "damaged"
        raise InputError(f"{path} cannot be read ({reason}): check the path.") from error
