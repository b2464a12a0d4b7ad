"""Column sums of causal attention in two passes over keys and queries, without the matrix: Triton.

The first pass finds each query's log-sum-exp, the second sums over queries for a block of keys; no
atomics, so results repeat bit for bit.  Import this module only where Triton is installed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES = 64  # of one tile
KEYS = 128
OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit  # type: ignore[untyped-decorator]
def query_tile(query, t, T, D: tl.constexpr, TYPE: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton takes annotations for its own
    """Queries `[BLOCK_Q, BLOCK_D]` of one head."""
    c = tl.arange(0, BLOCK_D)
    inside = (t < T)[:, None] & (c < D)[None, :]
    return tl.load(query + t[:, None] * D + c[None, :], mask=inside, other=0.0).to(TYPE)


@triton.jit  # type: ignore[untyped-decorator]
def key_tile(key, s, S, D: tl.constexpr, TYPE: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys `[BLOCK_D, BLOCK_S]` of one head."""
    c = tl.arange(0, BLOCK_D)
    inside = (c < D)[:, None] & (s < S)[None, :]
    return tl.load(key + s[None, :] * D + c[:, None], mask=inside, other=0.0).to(TYPE)


@triton.jit  # type: ignore[untyped-decorator]
def log_sum_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    log_sum,
    scale,
    T,
    S,
    G: tl.constexpr,
    D: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """log2 of the sum over visible keys of 2**logit for BLOCK_Q queries of one head."""
    head = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = query_tile(query + head * T * D, t, T, D, TYPE, BLOCK_D)
    keys = key + head // G * S * D
    most = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    end = tl.minimum(S, S - T + (tl.program_id(0) + 1) * BLOCK_Q)
    for start in range(0, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        k = key_tile(keys, s, S, D, TYPE, BLOCK_D)
        logits = tl.dot(q, k, input_precision=PRECISION) * scale
        seen = (s[None, :] <= S - T + t[:, None]) & (s < S)[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        high = tl.maximum(most, tl.max(logits, 1))  # finite: key 0 is seen by all
        total = total * tl.exp2(most - high) + tl.sum(tl.exp2(logits - high[:, None]), 1)
        most = high
    tl.store(log_sum + head * T + t, most + tl.log2(total), mask=t < T)


@triton.jit  # type: ignore[untyped-decorator]
def column_sum_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    log_sum,
    out,
    scale,
    T,
    S,
    G: tl.constexpr,
    D: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sums of BLOCK_S keys of one kv head over its group's queries."""
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_S
    s = first + tl.arange(0, BLOCK_S)
    k = key_tile(key + head * S * D, s, S, D, TYPE, BLOCK_D)
    total = tl.zeros([BLOCK_S], tl.float32)
    start = tl.maximum(first - (S - T), 0) // BLOCK_Q * BLOCK_Q  # earlier queries see none of these
    for g in range(G):
        own = head * G + g
        for at in range(start, T, BLOCK_Q):
            t = at + tl.arange(0, BLOCK_Q)
            q = query_tile(query + own * T * D, t, T, D, TYPE, BLOCK_D)
            log = tl.load(log_sum + own * T + t, mask=t < T, other=0.0)
            logits = tl.dot(q, k, input_precision=PRECISION) * scale - log[:, None]
            seen = (s[None, :] <= S - T + t[:, None]) & (t < T)[:, None]
            total += tl.sum(tl.exp2(tl.where(seen, logits, float("-inf"))), 0)
    tl.store(out + head * S + s, total, mask=s < S)


def column_sums(
    query: Tensor, key: Tensor, *, scale: float, compute: torch.dtype | None = None
) -> Tensor:
    """As `naive.column_sums`, with memory for one number per query instead of a block.

    Products take operands of `compute`, by default the queries' type, and add in float32.
    """
    B, H, T, D = query.shape
    K, S = key.shape[1], key.shape[2]
    assert H % K == 0, (H, K)
    assert 0 < T <= S, (T, S)
    assert key.shape == (B, K, S, D), (key.shape, query.shape)
    assert query.dtype in TYPES, "the kernels add in float32"
    query, key = query.contiguous(), key.contiguous()
    log_sum = torch.empty(B, H, T, dtype=torch.float32, device=query.device)
    out = torch.empty(B, K, S, dtype=torch.float32, device=query.device)
    dtype = compute or query.dtype
    assert query.is_cuda or dtype != torch.bfloat16, "the interpreter cannot compute in bfloat16"
    fixed: dict[str, Any] = {
        "G": H // K,
        "D": D,
        "TYPE": TYPES[dtype],
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # of float32 operands only
        "BLOCK_Q": QUERIES,
        "BLOCK_S": KEYS,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        **OPTIONS,
    }
    powers = scale * math.log2(math.e)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]  # where Triton launches
        log_sum_kernel[(triton.cdiv(T, QUERIES), B * H)](query, key, log_sum, powers, T, S, **fixed)
        column_sum_kernel[(triton.cdiv(S, KEYS), B * K)](
            query, key, log_sum, out, powers, T, S, **fixed
        )
    return out
