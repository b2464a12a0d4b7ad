"""Other decoders with full attention: nothing changes at budget 1, bytes hold at budget 0.4."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from cacheplan.adapters.language import describe
from cacheplan.errors import UnsupportedError
from cacheplan.runtime import apply
from cacheplan.types import KeyDifference, KVAction

FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {"use_sliding_window": False},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": None, "head_dim": 16},
    "Phi3": {"pad_token_id": 0, "sliding_window": None},
    "Olmo2": {},
    "Gemma": {"head_dim": 16},
    "StableLm": {},
    "Starcoder2": {"sliding_window": None},
    "GPTNeoX": {},
    "Mixtral": {"sliding_window": None, "num_local_experts": 2, "head_dim": 16},
}
IDS = torch.randint(0, 60, (1, 40), generator=torch.Generator().manual_seed(5))


def tiny(name: str) -> Any:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=None,
        **FAMILIES[name],
    )
    config._attn_implementation = "sdpa"
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, make_plan: Any) -> None:
    model = tiny(name)
    spec = describe(model, name)
    settings = {"do_sample": False, "max_new_tokens": 6, "attention_mask": torch.ones_like(IDS)}
    full = model.generate(IDS, **settings)
    with apply(model, make_plan(KVAction(keep=1.0), spec=spec)) as caches:
        assert torch.equal(model.generate(IDS, **settings), full)
    assert caches[0].nbytes == caches[0].planned_bytes
    heads = {
        (layer, head): KVAction(keep=0.2 + 0.4 * (head % 2), scorer=KeyDifference(), recent=2)
        for layer in range(2)
        for head in range(spec.kv_heads)
    }
    with apply(model, make_plan(heads, spec=spec)) as caches:
        planned = model.generate(IDS, **settings)
    assert planned[0, 40] == full[0, 40]
    assert caches[0].nbytes == caches[0].planned_bytes
    assert caches[0].lengths[0] == [8 + 5, 24 + 5] * (spec.kv_heads // 2)


def test_latent_attention_is_refused() -> None:
    config = transformers.DeepseekV3Config(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, moe_intermediate_size=8, n_routed_experts=4,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="latent"):
        describe(transformers.DeepseekV3ForCausalLM(config))


def test_eager_models_are_refused(tiny_llama: Any, make_plan: Any) -> None:
    tiny_llama.set_attn_implementation("eager")
    try:
        with (
            pytest.raises(UnsupportedError, match="sdpa"),
            apply(tiny_llama, make_plan(KVAction(keep=0.5))),
        ):
            raise AssertionError("not reached")
    finally:
        tiny_llama.set_attn_implementation("sdpa")
