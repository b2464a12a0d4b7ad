"""Rotary frequencies read off a model's code, against the rotation its own functions do."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers

from cacheplan.adapters.rotary import rotary_frequencies, rotary_known
from cacheplan.errors import UnsupportedError
from cacheplan.scorers.expected import turned
from cacheplan.scorers.scores import Rotary

SIZES = {
    "vocab_size": 17,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def build(family: str, **changes: Any) -> Any:
    kind = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, kind + "Config")(**SIZES | changes)
    return getattr(transformers, family + "ForCausalLM")(config).eval()


def attention(model: Any) -> Any:
    return next(m for m in model.modules() if type(m).__name__.endswith("Attention"))


@pytest.mark.parametrize(
    ("family", "changes", "length"),
    [
        ("Llama", {}, 20),
        ("Llama", {"rope_parameters": {"rope_theta": 1e4} | YARN}, 20),
        ("Llama", {"rope_parameters": {"rope_theta": 1e4} | LLAMA3}, 20),
        (
            "Llama",
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}},
            90,
        ),
        ("Qwen3", {}, 20),
        ("Glm", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, 20),
        ("Phi", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, 20),
        ("Cohere", {}, 20),
    ],
)
def test_turning_by_the_frequencies_is_the_models_rotation(
    family: str, changes: dict[str, Any], length: int
) -> None:
    model = build(family, **changes)
    module = attention(model)
    rotary = Rotary(*rotary_frequencies(module, length, torch.device("cpu")))
    x = torch.randn(1, 1, length, 16)
    positions = torch.arange(length)
    cos, sin = model.get_decoder().rotary_emb(x, positions[None])
    size = cos.shape[-1]
    apply = sys.modules[type(module).__module__].apply_rotary_pos_emb
    found = torch.cat([apply(x[..., :size], x[..., :size], cos, sin)[0], x[..., size:]], -1)
    if family == "Glm":  # its function leaves the other channels alone itself
        found = apply(x, x, cos, sin)[0]
    angle = positions[:, None] * rotary.frequencies
    scaling = model.get_decoder().rotary_emb.attention_scaling
    expected = turned(x, angle.cos() * scaling, angle.sin() * scaling, rotary)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert rotary_known(model)


def test_layers_without_rotation_have_no_frequencies() -> None:
    model = build("SmolLM3", no_rope_layers=[0, 1], no_rope_layer_interval=2)
    modules = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    lengths = [len(rotary_frequencies(m, 9, torch.device("cpu"))[0]) for m in modules]
    assert lengths == [0, 8]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Gemma3", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("Gemma3", {"layer_types": ["full_attention"] * 2}),
        ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 32}),
    ],
)
def test_what_cannot_be_told_is_refused(family: str, changes: dict[str, Any]) -> None:
    model = build(family, **changes)
    assert not rotary_known(model)
    with pytest.raises(UnsupportedError, match="solve with another recipe"):
        rotary_frequencies(attention(model), 9, torch.device("cpu"))
