"""Expected attention in a running model, against queries taken before the model rotates them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import rotate_half

from cacheplan.runtime import PlanCache, apply
from cacheplan.types import ExpectedAttention, KVAction

PROMPT, KEPT, SKIPPED, FUTURE = 60, 15, 4, 16


def expected_scores(model: Any, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scores `[K, S]` from unrotated queries `[H, S, D]` of one layer, head by head."""
    H, S, D = query.shape
    positions = torch.arange(S, S + FUTURE)[None]
    cos, sin = model.get_decoder().rotary_emb(query, positions)
    identity = torch.eye(D)
    turn = (identity * cos[0].mean(0)[:, None]) + rotate_half(identity).T * sin[0].mean(0)[:, None]
    scores = torch.zeros(len(key), S - SKIPPED)
    for h in range(H):
        late = query[h, SKIPPED:]
        mean, covariance = turn @ late.mean(0), turn @ torch.cov(late.T, correction=0) @ turn.T
        k = key[h // (H // len(key)), SKIPPED:]
        z = k @ mean / D**0.5 + ((k @ covariance) * k).sum(-1) / (2 * D)
        scores[h // (H // len(key))] += z.softmax(-1)
    weighed: Tensor = scores * value[:, SKIPPED:].norm(dim=-1)
    return weighed


def test_tokens_are_those_of_the_unrotated_queries(tiny_llama: Any, make_plan: Any) -> None:
    action = KVAction(
        keep=KEPT / PROMPT, scorer=ExpectedAttention(future=FUTURE, skipped=SKIPPED), sinks=SKIPPED
    )
    plan = make_plan(action)
    ids = torch.randint(0, 97, (1, PROMPT))
    queries: list[Tensor] = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(
            lambda module, args, output: queries.append(output[0].view(PROMPT, 4, 16))
        )
        for layer in tiny_llama.get_decoder().layers
    ]
    full, cache = DynamicCache(config=tiny_llama.config), PlanCache(plan)
    with torch.no_grad():
        tiny_llama(input_ids=ids, past_key_values=full)
        for hook in hooks:
            hook.remove()
        with apply(tiny_llama, plan):
            tiny_llama(input_ids=ids, past_key_values=cache)
    for index, (layer, dense) in enumerate(zip(cache.layers, full.layers, strict=True)):
        query = queries[index].transpose(0, 1)
        scores = expected_scores(tiny_llama, index, query, dense.keys[0], dense.values[0])
        best = scores.topk(KEPT - SKIPPED).indices.sort().values + SKIPPED
        for h in range(2):
            kept = torch.cat([torch.arange(SKIPPED), best[h]])
            assert torch.equal(layer.rows.keys[layer.rows.row(h)], dense.keys[0, h, kept])
