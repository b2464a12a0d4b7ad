"""Tiny decoders of every common family with random weights, and a dense model to judge them by."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

VOCABULARY, WINDOW = 97, 24

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # attention far from uniform, so that evictions differ
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WIDE = {"head_dim": 16}
MIXED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
}
SHARED = {  # the last two layers read the keys of layers 2 and 3
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": WINDOW,
    "head_dim": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}
MAMBA = {
    "num_hidden_layers": 3,
    "mamba_d_state": 8,
    "mamba_d_conv": 3,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "mistral": ("Mistral", {**WIDE, "sliding_window": None}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen2-windows": ("Qwen2", {**MIXED, "use_sliding_window": True}),
    "qwen3": ("Qwen3", WIDE),
    "qwen3-moe": ("Qwen3Moe", {**WIDE, **EXPERTS}),
    "mixtral": ("Mixtral", {"sliding_window": None, "num_local_experts": 2}),
    "gemma": ("Gemma", WIDE),
    "gemma2": ("Gemma2", {**WIDE, **MIXED, "attn_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", {**WIDE, **MIXED}),
    "gemma3n": ("Gemma3nText", {**SHARED, "laurel_rank": 4, "activation_sparsity_pattern": None}),
    "gemma4": ("Gemma4Text", {**SHARED, "global_head_dim": 16}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", MIXED),
    "gpt-oss": (
        "GptOss",
        {
            **WIDE,
            **MIXED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": None,
        },
    ),
    "gpt-neox": ("GPTNeoX", {}),
    "gpt2": ("GPT2", {}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {"sliding_window": None}),
    "cohere2": ("Cohere2", MIXED),
    "granite": ("Granite", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "glm4": ("Glm4", WIDE),
    "llama4": (
        "Llama4Text",
        {
            **WIDE,
            "num_hidden_layers": 4,
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0, 1, 0],
            "moe_layers": [1],
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
        },
    ),
    "qwen3-next": (
        "Qwen3Next",
        {**WIDE, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 24},
    ),
    "qwen3.5": ("Qwen3_5Text", {**WIDE, **LINEAR}),
    "lfm2": (
        "Lfm2",
        {
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "jamba": (
        "Jamba",
        {
            "num_hidden_layers": 3,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "granite-hybrid": (
        "GraniteMoeHybrid",
        {
            **MAMBA,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 24,
        },
    ),
    # refused
    "mistral-windows": ("Mistral", {"sliding_window": WINDOW}),
    "falcon-h1": ("FalconH1", {**MAMBA, "mamba_d_ssm": 64}),
    "minimax": ("MiniMax", {}),
    "bloom": ("Bloom", {}),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "moe_intermediate_size": 8,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}


def build(name: str) -> Any:
    """A model of the family; its attention is SDPA where transformers has that."""
    kind, changes = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **changes})
    words = {"GPT2": "GPT2LMHeadModel"}
    cls = getattr(transformers, words.get(kind, kind.removesuffix("Text") + "ForCausalLM"))
    capped = "attn_logit_softcapping" in changes
    config._attn_implementation = "sdpa" if cls._supports_sdpa and not capped else "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config).eval()


def kept_mask(cache: Any, full: Any) -> dict[int, Tensor]:
    """Which prompt tokens the rows of each planned layer hold, `[B, K, S]`, told by their keys."""
    masks = {}
    for layer in cache.planned_layers:
        dense = full.layers[layer.index].keys
        B, K, S, _ = dense.shape
        mask = torch.zeros(B * K, S, dtype=torch.bool)
        for r in range(B * K):
            held = layer.rows.keys[layer.rows.row(r)]
            apart = torch.cdist(held.double(), dense.reshape(B * K, S, -1)[r].double())
            assert apart.amin(1).max() < 1e-4, "every kept key is one of the prompt's"
            mask[r, apart.argmin(1)] = True
            assert mask[r].sum() == len(held)
        masks[layer.index] = mask.view(B, K, S)
    return masks


def masked_dense_logits(
    model: Any,
    inputs: dict[str, Tensor],
    *,
    context: int,
    masks: dict[int, Tensor],
    images: Tensor | None = None,
) -> Tensor:
    """Logits of a full forward in which queries from `context` on cannot see evicted keys.

    `masks` are by layer.  `images` `[T]` numbers the images whose tokens see each other in both
    directions; -1 is text.
    """
    decoder = model.get_decoder()
    config = decoder.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    own = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scaling: float | None = None,
        s_aux: Tensor | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        T, G = query.shape[2], query.shape[1] // key.shape[1]
        layer = module.layer_idx
        kind = kinds[layer]
        if layer >= own:  # reads the keys of the last layer of its kind that has some
            layer = max(i for i in range(own) if kinds[i] == kind)
        at = torch.arange(T)
        allowed = at <= at[:, None]
        if images is not None:
            allowed |= (images == images[:, None]) & (images >= 0)
        if kind == "sliding_attention":
            allowed &= at > at[:, None] - config.sliding_window
        elif kind == "chunked_attention":
            size = config.attention_chunk_size
            allowed &= at // size == at[:, None] // size
        shown = torch.ones(*key.shape[:2], T, dtype=torch.bool)
        if layer in masks:
            shown[:, :, :context] = masks[layer]
        seen = allowed & (shown[:, :, None] | (at < context)[:, None])  # [B, K, T, T]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        logits = query @ key.repeat_interleave(G, 1).transpose(-1, -2) * scale
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        logits = logits.masked_fill(~seen.repeat_interleave(G, 1), float("-inf"))
        if s_aux is not None:
            logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(len(key), -1, T, 1)], -1)
        weights = logits.softmax(-1)[..., :T]
        return (weights @ value.repeat_interleave(G, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("masked_dense", attention)
    AttentionMaskInterface.register("masked_dense", lambda *args, **kwargs: None)
    running = config._attn_implementation
    decoder.set_attn_implementation("masked_dense")
    try:
        with torch.no_grad():
            logits: Tensor = model(**inputs, use_cache=False).logits
            return logits
    finally:
        decoder.set_attn_implementation(running)
