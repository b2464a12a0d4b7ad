"""Decoder language models of transformers: load them, describe them, refuse what is not theirs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cacheplan.adapters.decoder import text_decoder
from cacheplan.adapters.digest import digest
from cacheplan.adapters.images import image_token
from cacheplan.adapters.offloading import Weights, placement_arguments
from cacheplan.errors import InputError, UnsupportedError
from cacheplan.placement import Placement
from cacheplan.types import FULL_ATTENTION, LanguageSpec

# layers whose cache does not grow with the text, in transformers' words
_BOUNDED = ("sliding_attention", "chunked_attention", "linear_attention", "conv", "dummy")
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


@dataclass(frozen=True, eq=False)
class LanguageModel:
    model: Any
    tokenizer: Any
    spec: LanguageSpec
    processor: Any = None  # of images too; None for models of text alone


def load(
    name: str | None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    placement: Placement | None = None,
) -> LanguageModel:
    """Load a language model, with or without vision, by hub id, folder, or embedded name.

    `name` None means the embedded model.  `dtype` None takes the checkpoint's own.  `placement`
    divides the model over devices, instead of `device`.  Raises InputError if it cannot be loaded
    and UnsupportedError if plans cannot run on it.
    """
    try:
        from transformers import AutoConfig, AutoTokenizer

        from cacheplan.adapters.attention import stock_attention
    except ImportError as error:
        raise InputError(
            f"Language models need the package transformers ({error}): "
            'run `pip install "cacheplan[llm]"`.'
        ) from error

    from cacheplan.zoo import EMBEDDED_LANGUAGE_MODEL, embedded_path

    name = name or EMBEDDED_LANGUAGE_MODEL
    source = embedded_path(name) or name
    placed = placement_arguments(placement, device)
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = getattr(torch, dtype) if dtype else "auto"
        with _without_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(source)
            loader, processor = _loader(AutoConfig.from_pretrained(source), source)
            model = loader.from_pretrained(source, dtype=kind, **placed)
            decoder = text_decoder(model)
            decoder.set_attn_implementation(stock_attention(decoder))
            if placement is None:
                model = model.to(where)
    except (OSError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(
            f'The model "{name}" could not be loaded ({reason}): give a Hugging Face id, '
            f'a folder with config.json and weights, or "{EMBEDDED_LANGUAGE_MODEL}".'
        ) from error
    model.eval()
    if not Path(source).exists() or embedded_path(name):
        shown = name
    else:
        shown = str(Path(source).resolve())
    return LanguageModel(model, tokenizer, describe(model, shown), processor)


def _loader(config: Any, source: Any) -> tuple[Any, Any]:
    """The class that loads a model of this configuration, and its processor of images."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    if image_token(config) is None:
        return AutoModelForCausalLM, None
    try:
        processor = AutoProcessor.from_pretrained(source)
    except (ImportError, OSError, ValueError):
        processor = None  # text alone needs none; an image will ask for it
    if not hasattr(processor, "image_processor"):
        processor = None
    return AutoModelForImageTextToText, processor


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def describe(model: Any, name: str | None = None) -> LanguageSpec:
    """Describe a loaded model, taking cache widths from the tensors it really stores.

    Raises UnsupportedError if plans cannot run on it.
    """
    from cacheplan.adapters.probe import stored_shapes

    config = model.config.get_text_config(decoder=True)
    kinds = _layer_kinds(model, config)
    planned = [index for index, kind in enumerate(kinds) if kind == FULL_ATTENTION]
    key, value = stored_shapes(model, planned, readers(model))
    return LanguageSpec(
        id=name or model.config._name_or_path or type(model).__name__,
        architecture=type(model).__name__,
        layer_kinds=kinds,
        query_heads=config.num_attention_heads,
        kv_heads=key[1],
        key_width=key[3],
        value_width=value[3],
        max_length=getattr(config, "max_position_embeddings", 0) or 0,
        rope=json.dumps(getattr(config, "rope_parameters", None), sort_keys=True, default=str),
        digest=_digest(model),
        image_token=image_token(model.config),
    )


def _layer_kinds(model: Any, config: Any) -> tuple[str, ...]:
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{name} is an encoder-decoder, but plans are for decoder-only models."
        )
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedError(
            f"{name} caches a compressed latent (MLA), which has no kv heads to plan for yet."
        )
    if not model._can_set_attn_implementation():
        raise UnsupportedError(
            f"{name} does not use transformers' attention interface, so plans cannot run on it."
        )
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds, _ = get_layer_types_and_kwargs(config)
    # before 5.23 transformers made no entry for layers that read another's keys
    kinds = [*kinds, *["dummy"] * (config.num_hidden_layers - len(kinds))]
    if odd := sorted(set(kinds) - {FULL_ATTENTION, *_BOUNDED}):
        raise UnsupportedError(
            f"{name} has {', '.join(odd)} layers, whose caches grow with the text in a way that "
            "plans cannot describe yet."
        )
    if FULL_ATTENTION not in kinds:
        raise UnsupportedError(
            f"{name} has only {', '.join(sorted(set(kinds)))} layers, whose caches do not grow "
            "with the text: there is nothing to plan."
        )
    return tuple(kinds)


def readers(model: Any) -> list[int]:
    """How many layers read each layer's keys: more than one where later layers share them.

    The last layers of a model may read those of the last layer of their kind before them.
    """
    config = model.config.get_text_config(decoder=True)
    layers, shared = config.num_hidden_layers, getattr(config, "num_kv_shared_layers", 0) or 0
    found = [1] * layers
    if shared:
        own, kinds = layers - shared, config.layer_types
        for kind in kinds[own:]:
            found[max(index for index in range(own) if kinds[index] == kind)] += 1
    return found


def _digest(model: Any) -> str:
    config = {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE}
    config = {k: v for k, v in config.items() if not k.startswith("_attn_implementation")}
    return digest([(config, Weights(model))])
