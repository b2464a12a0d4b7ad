"""The Triton kernels of decode attention over ragged rows: partial results, then their merger.

Tokens are the rows of both products, K @ Q^T and V^T @ P^T, because the few query heads of a row
fit the small side of a matrix instruction.  Codes enter the products as whole numbers; scales and
zeros act on queries (keys, per channel), logits (keys, per token) and weights (values).
"""

# mypy: disable-error-code="assignment,var-annotated"
# (tuples grow in loops that Triton unrolls)

from __future__ import annotations

import triton
import triton.language as tl

# Weights reach 2**5: times a small scale they stay normal in float16, times 2047 they are finite.
LIFT = tl.constexpr(5.0)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def numbers(  # type: ignore[no-untyped-def]  # Triton takes annotations for its own
    raw, PLANE: tl.constexpr, BITS: tl.constexpr, CODES: tl.constexpr, TYPE: tl.constexpr
):
    """The codes of one plane of bytes; floating-point numbers as they are."""
    if CODES:
        code = (raw >> (PLANE * BITS)) & (2**BITS - 1)
        if tl.float16 == TYPE:  # 0x6400 + n are the bits of 1024 + n: no conversion of integers
            found = (code.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
        else:
            found = code.to(TYPE)
    elif BITS == 8:
        found = raw.to(tl.float8e4nv, bitcast=True).to(TYPE)
    else:
        found = raw.to(TYPE)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def decode_kernel(  # type: ignore[no-untyped-def]
    query,
    keys,
    key_scale,
    key_zero,
    values,
    value_scale,
    value_zero,
    channel_scale,
    bias,
    offsets,
    lengths,
    items,
    partial,
    logsum,
    scale,
    softcap,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_CODES: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    KEY_TYPE: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_TYPE: tl.constexpr,
    SEPARABLE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One item: the normalised result `[G, DV]` of some tokens, and log2 of their sum `[G]`.

    `scale` and `softcap` hold log2(e) too, so that all exponentials are powers of two.  KEY_GROUP
    counts tokens of scales per channel, the two GROUPS scales per token; 0: there are none.
    """
    KP: tl.constexpr = 8 // KEY_BITS if KEY_BITS < 8 else 1  # planes of a byte
    VP: tl.constexpr = 8 // VALUE_BITS if VALUE_BITS < 8 else 1
    KW: tl.constexpr = D // KP
    VW: tl.constexpr = DV // VP
    FULL: tl.constexpr = KEY_GROUP > 0  # rows end with a group, and so with a tile
    item = items + 4 * tl.program_id(0)
    row = tl.load(item)
    if row < 0:
        return
    first = tl.load(item + 1)
    end = tl.minimum(tl.load(item + 2), tl.load(lengths + row))
    slot = tl.load(item + 3).to(tl.int64)
    base = tl.load(offsets + row).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_V)
    q = ()
    outs = ()
    constants = ()
    for i in tl.static_range(KP):
        place = (row.to(tl.int64) * G + h)[None, :] * D + i * KW + c[:, None]
        plane = tl.load(query + place, mask=(h < G)[None, :] & (c < KW)[:, None], other=0.0)
        q += (plane.to(tl.float32) * scale,)  # [BLOCK_K, BLOCK_H]
    for _ in tl.static_range(VP):
        outs += (tl.zeros([BLOCK_V, BLOCK_H], tl.float32),)
    for _ in tl.static_range(VALUE_GROUPS):
        constants += (tl.zeros([BLOCK_T, BLOCK_H], tl.float32),)
    most = tl.full([BLOCK_H], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)  # added up across threads only at the end
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = tl.full([BLOCK_T], True, tl.int1) if FULL else t < end
        token = base + t
        at = token[:, None] * KW + c[None, :]
        if FULL and KW == BLOCK_K:
            raw = tl.load(keys + at)
        else:
            raw = tl.load(keys + at, mask=inside[:, None] & (c < KW)[None, :], other=0)
        logits = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
        for i in tl.static_range(KP):
            k = numbers(raw, i, KEY_BITS, KEY_CODES, KEY_TYPE)
            if FULL:  # the whole tile lies in one group of tokens
                near = ((base + start) // KEY_GROUP) * D + i * KW + c
                s = tl.load(key_scale + near, mask=c < KW, other=0.0).to(tl.float32)
                z = tl.load(key_zero + near, mask=c < KW, other=0.0).to(tl.float32)
                scaled = (q[i] * s[:, None]).to(KEY_TYPE)
                logits = tl.dot(k, scaled, logits, input_precision=PRECISION)
                logits += tl.sum(q[i] * z[:, None], 0)[None, :]
            elif KEY_GROUPS > 0:
                at = token * KEY_GROUPS + i * KEY_GROUPS // KP
                s = tl.load(key_scale + at, mask=inside, other=0.0).to(tl.float32)
                part = tl.dot(k, q[i].to(KEY_TYPE), input_precision=PRECISION)
                logits += part * s[:, None]
                if KEY_CODES:
                    z = tl.load(key_zero + at, mask=inside, other=0.0).to(tl.float32)
                    logits += z[:, None] * tl.sum(q[i], 0)[None, :]
            else:
                logits = tl.dot(k, q[i].to(KEY_TYPE), logits, input_precision=PRECISION)
        if HAS_SOFTCAP:  # softcap * tanh(logits / softcap)
            turned = tl.exp2(logits * (2 * LOG2E / softcap)) + 1.0
            logits = softcap - 2.0 * softcap / turned
        if HAS_BIAS:
            logits += (tl.load(bias + token, mask=inside, other=0.0) * LOG2E)[:, None]
        if not FULL:
            logits = tl.where(inside[:, None], logits, float("-inf"))
        high = tl.maximum(most, tl.max(logits, 0))
        decay = tl.exp2(most - high)[None, :]
        most = high
        p = tl.exp2(logits - (high - LIFT)[None, :])
        sums = sums * decay + p
        at = token[None, :] * VW + d[:, None]
        if FULL and VW == BLOCK_V:
            raw = tl.load(values + at)
        else:
            raw = tl.load(values + at, mask=inside[None, :] & (d < VW)[:, None], other=0)
        if VALUE_GROUPS > 0:
            weights = ()
            later = ()
            for i in tl.static_range(VALUE_GROUPS):
                at = token * VALUE_GROUPS + i
                s = tl.load(value_scale + at, mask=inside, other=0.0).to(tl.float32)
                weights += ((p * s[:, None]).to(VALUE_TYPE),)
                if VALUE_CODES:
                    z = tl.load(value_zero + at, mask=inside, other=0.0).to(tl.float32)
                    later += (constants[i] * decay + p * z[:, None],)
                else:
                    later += (constants[i],)
            constants = later
        else:
            weights = (p.to(VALUE_TYPE),)
        later = ()
        for i in tl.static_range(VP):
            v = numbers(raw, i, VALUE_BITS, VALUE_CODES, VALUE_TYPE)  # [BLOCK_V, BLOCK_T]
            own = weights[i * VALUE_GROUPS // VP]
            later += (tl.dot(v, own, outs[i] * decay, input_precision=PRECISION),)
        outs = later
    total = tl.sum(sums, 0)
    some = total > 0  # else the row ended before this item
    factor = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    for i in tl.static_range(VP):
        out = outs[i]
        if VALUE_CODES:
            out += tl.sum(constants[i * VALUE_GROUPS // VP], 0)[None, :]
        out *= factor[None, :]
        channel = i * VW + d
        if SEPARABLE:
            by = tl.load(channel_scale + row * DV + channel, mask=d < VW, other=0.0)
            out *= by.to(tl.float32)[:, None]
        place = (slot * G + h)[None, :] * DV + channel[:, None]
        tl.store(partial + place, out, mask=(h < G)[None, :] & (d < VW)[:, None])
    tl.store(logsum + slot * G + h, most - LIFT + tl.log2(tl.where(some, total, 1.0)), mask=h < G)


@triton.jit  # type: ignore[untyped-decorator]
def merge_kernel(  # type: ignore[no-untyped-def]
    partial,
    logsum,
    ranges,
    sinks,
    out,
    HKV,
    G: tl.constexpr,
    DV: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The result of one query head from its row's slots, weighted by their sums."""
    row = tl.program_id(0)
    h = tl.program_id(1)
    first = tl.load(ranges + row)
    end = tl.load(ranges + row + 1)
    d = tl.arange(0, BLOCK_V)
    if HAS_SINKS:
        most = tl.load(sinks + row % HKV * G + h).to(tl.float32) * LOG2E
        total = most * 0.0 + 1.0
    else:
        most = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([], tl.float32)
    found = tl.zeros([BLOCK_V], tl.float32)
    for start in range(first, end, BLOCK_S):
        slot = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        inside = slot < end
        log = tl.load(logsum + slot * G + h, mask=inside, other=float("-inf"))
        high = tl.maximum(most, tl.max(log, 0))
        base = tl.where(high == float("-inf"), 0.0, high)  # no token so far
        decay = tl.exp2(most - base)
        weight = tl.exp2(log - base)
        most = high
        at = (slot * G + h)[:, None] * DV + d[None, :]
        own = tl.load(partial + at, mask=inside[:, None] & (d < DV)[None, :], other=0.0)
        found = found * decay + tl.sum(own * weight[:, None], 0)
        total = total * decay + tl.sum(weight, 0)
    found = tl.where(total > 0, found / tl.where(total > 0, total, 1.0), 0.0)
    at = (row.to(tl.int64) * G + h) * DV + d
    tl.store(out + at, found.to(out.dtype.element_ty), mask=d < DV)
