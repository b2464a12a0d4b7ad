"""Patterns, biases, learned sinks and soft caps of ragged attention against the full matrix."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.kernels.ragged_attention.naive import ragged_attention

D, GROUP, HEADS = 8, 2, 2


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 2),
    T=st.integers(1, 5),
    lengths=st.lists(st.integers(0, 30), min_size=4, max_size=4),
    alike=st.booleans(),
    patterned=st.booleans(),
    biased=st.booleans(),
    sinks=st.booleans(),
    softcap=st.sampled_from([None, 0.7, 5.0]),
    seed=st.integers(0, 99),
)
def test_ragged_softmax(
    batch: int,
    T: int,
    lengths: list[int],
    alike: bool,
    patterned: bool,
    biased: bool,
    sinks: bool,
    softcap: float | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rows = batch * HEADS
    own = [T + (lengths[0] if alike else n) for n in lengths[:rows]]
    offsets = [sum(own[:r]) for r in range(rows)]
    keys, values = torch.randn(sum(own), D), torch.randn(sum(own), D)
    query = torch.randn(batch, HEADS * GROUP, T, D)
    bias = torch.randn(sum(own)) if biased else None
    extra = torch.randn(HEADS * GROUP) if sinks else None
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    seen = causal | torch.rand(batch, T, T).gt(0.5) if patterned else causal.expand(batch, T, T)
    expected = torch.empty(batch, HEADS * GROUP, T, D)
    for r, (offset, n) in enumerate(zip(offsets, own, strict=True)):
        b, h = divmod(r, HEADS)
        allowed = torch.cat([torch.ones(T, n - T, dtype=torch.bool), seen[b]], 1)
        for g in range(h * GROUP, (h + 1) * GROUP):
            logits = query[b, g] @ keys[offset : offset + n].T * 0.4
            if softcap is not None:
                logits = softcap * (logits / softcap).tanh()
            if bias is not None:
                logits = logits + bias[offset : offset + n]
            logits = logits.masked_fill(~allowed, -torch.inf)
            if extra is not None:
                logits = torch.cat([logits, extra[g].expand(T, 1)], 1)
            expected[b, g] = logits.softmax(-1)[:, :n] @ values[offset : offset + n]
    found = ragged_attention(
        query, keys, values, offsets=offsets, lengths=own, scale=0.4,
        pattern=seen if patterned else None, bias=bias, sinks=extra, softcap=softcap,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
