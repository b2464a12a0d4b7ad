"""Decoder language models of transformers: load them, describe them, refuse what is not theirs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cacheplan.adapters.digest import digest
from cacheplan.errors import InputError, UnsupportedError
from cacheplan.types import FULL_ATTENTION, LanguageSpec

_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


@dataclass(frozen=True, eq=False)
class LanguageModel:
    model: Any
    tokenizer: Any
    spec: LanguageSpec


def load(name: str | None, *, device: str | None = None, dtype: str | None = None) -> LanguageModel:
    """Load a causal language model and its tokenizer by hub id, folder, or embedded name.

    `name` None means the embedded model.  `dtype` None takes the checkpoint's own.  Raises
    InputError if it cannot be loaded and UnsupportedError if plans cannot run on it.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise InputError(
            f"Language models need the package transformers ({error}): "
            'run `pip install "cacheplan[llm]"`.'
        ) from error

    from cacheplan.zoo import EMBEDDED_LANGUAGE_MODEL, embedded_path

    name = name or EMBEDDED_LANGUAGE_MODEL
    source = embedded_path(name) or name
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = getattr(torch, dtype) if dtype else "auto"
        with _without_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=kind, attn_implementation="sdpa"
            ).to(where)
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
    return LanguageModel(model, tokenizer, describe(model, shown))


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
    """Describe a loaded model, taking cache widths from the tensors it really stores."""
    config = model.config.get_text_config(decoder=True)
    kinds = _layer_kinds(model, config)
    key, value = _stored_widths(model)
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
    other = sorted(set(kinds) - {FULL_ATTENTION})
    if other:
        raise UnsupportedError(
            f"{name} has {', '.join(other)} layers, but only models whose layers are all "
            "full_attention can be planned so far."
        )
    return tuple(kinds)


@torch.no_grad()
def _stored_widths(model: Any) -> tuple[torch.Size, torch.Size]:
    """Shapes of the first layer's keys and values after one token."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model.get_decoder()(input_ids=token, past_key_values=cache, use_cache=True)
    layers = [(layer.keys.shape, layer.values.shape) for layer in cache.layers]
    if len(set(layers)) > 1:
        raise UnsupportedError(
            f"{type(model).__name__} stores keys and values of different shapes in different "
            "layers, which plans cannot describe yet."
        )
    return layers[0]


def _digest(model: Any) -> str:
    config = {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE}
    config = {k: v for k, v in config.items() if not k.startswith("_attn_implementation")}
    return digest([(config, model.state_dict())])
