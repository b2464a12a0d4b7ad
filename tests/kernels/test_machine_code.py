"""The kernels' machine code for Hopper (sm_90), compiled without a GPU, against ceilings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cacheplan.kernels.decode_attention.segments import Segment, has_tiles
from cacheplan.kernels.quantize.naive import quantize
from cacheplan.kernels.quantize.packed import Format

D, GROUP = 128, 4  # channels, query heads per kv head

# Registers are per thread of 128: at most 168 keep three programs on a multiprocessor, 128 four.
# Instructions are those of the inner loop, lanes together, per element of keys and values; the
# memory of an H200 delivers an element per 15.6 (bf16), 7.8 (8 bits), 3.9 (4) and 1.95 (2).
#            keys            values        registers  shared   instructions
CEILINGS = {
    "bf16": (None, None, 128, 112 * 1024, 2.6),
    "bf16, soft cap and bias": (None, None, 128, 112 * 1024, 3.0),
    "fp8": (Format("fp8", "token"), Format("fp8", "token"), 128, 40 * 1024, 4.2),
    "int8": (Format("int8", "channel", 64), Format("int8", "token"), 168, 40 * 1024, 5.8),
    "int4": (Format("int4", "channel", 64), Format("int4", "token"), 128, 24 * 1024, 6.0),
    "int2": (Format("int2", "channel", 64), Format("int2", "token", 64), 168, 16 * 1024, 8.5),
    "int4, separable": (
        Format("int4", "channel", 64),
        Format("int4", "token", separable=True),
        128,
        24 * 1024,
        6.0,
    ),
    "int2, per token": (
        Format("int2", "token", 64),
        Format("int2", "token", 64),
        168,
        16 * 1024,
        8.5,
    ),
}

OTHERS = {  # registers, the only limit of kernels that wait for memory
    "merge": 64,
    "quantize int4 per channel": 64,
    "quantize int2 per channel": 128,
    "quantize int8 per token": 168,
    "quantize int4 per token": 128,
    "quantize fp8 per token": 128,
    "gather": 64,
    "append": 32,
}


@pytest.mark.parametrize("name", CEILINGS)
def test_decode_attention(
    compiled_kernel: Callable[[str], Any], machine_code: Callable[..., Any], name: str
) -> None:
    key, value, registers, shared, instructions = CEILINGS[name]
    module = compiled_kernel("decode_attention")
    plain = torch.zeros(64, D, dtype=torch.bfloat16)
    index = torch.zeros(1, dtype=torch.int32)
    own = Segment(
        plain if key is None else quantize(plain, key),
        plain if value is None else quantize(plain, value),
        index,
        index,
        torch.zeros(64) if "bias" in name else None,
    )
    dtype = torch.bfloat16 if key is None else torch.float16
    fixed = module.constants(own, GROUP, dtype, dtype, "soft cap" in name)
    types = dict.fromkeys(("keys", "values"), "*bf16" if key is None else "*u8")
    types |= dict.fromkeys(("key_scale", "key_zero", "value_scale", "value_zero"), "*fp16")
    types |= {"query": "*bf16", "channel_scale": "*fp16", "bias": "*fp32"}
    types |= {"scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(("offsets", "lengths", "items"), "*i32")
    types |= dict.fromkeys(("partial", "logsum"), "*fp32")
    options = module.OPTIONS | {"num_stages": module.stages(own)}
    code = machine_code(module.decode_kernel, types, fixed, options)
    lanes = 32 * module.OPTIONS["num_warps"]
    assert code.spilled == 0
    assert code.registers <= registers
    assert code.shared <= shared
    assert 0.5 < len(code.loop) * lanes / (2 * D * fixed["BLOCK_T"]) <= instructions
    assert {"HMMA", "HGMMA"}.intersection(code.loop)  # tensor cores
    assert not {"I2F", "I2FP"}.intersection(code.loop)  # codes become numbers without conversion


@pytest.mark.parametrize(
    ("channels", "dtype", "spilled"),
    [(256, "bf16", 0), (128, "fp32", 512)],  # exact products of float32 are no tensor cores'
)
def test_wide_heads_fit_into_a_multiprocessor(
    compiled_kernel: Callable[[str], Any],
    machine_code: Callable[..., Any],
    channels: int,
    dtype: str,
    spilled: int,
) -> None:
    module = compiled_kernel("decode_attention")
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    plain, index = torch.zeros(64, channels, dtype=kind), torch.zeros(1, dtype=torch.int32)
    own = Segment(plain, plain, index, index)
    assert has_tiles(own)
    names = ("query", "keys", "values", "key_scale", "key_zero", "value_scale", "value_zero")
    types = dict.fromkeys((*names, "channel_scale", "bias"), f"*{dtype}")
    types |= dict.fromkeys(("offsets", "lengths", "items"), "*i32")
    types |= dict.fromkeys(("partial", "logsum"), "*fp32") | {"scale": "fp32", "softcap": "fp32"}
    for memory in (module.SHARED, 100 * 1024):  # and of a GPU for games
        options = module.OPTIONS | {"num_stages": module.stages(own, memory)}
        fixed = module.constants(own, GROUP, kind, kind, softcap=True)
        code = machine_code(module.decode_kernel, types, fixed, options)
        assert code.spilled <= spilled
        assert code.shared < memory


@pytest.mark.parametrize("name", OTHERS)
def test_kernels_that_move(
    compiled_kernel: Callable[[str], Any], machine_code: Callable[..., Any], name: str
) -> None:
    if name == "merge":
        module = compiled_kernel("decode_attention")
        kernel, options = module.merge_kernel, module.MERGE_OPTIONS
        types = {"partial": "*fp32", "logsum": "*fp32", "ranges": "*i32", "sinks": "*fp32"}
        types |= {"out": "*bf16", "HKV": "i32"}
        fixed = {"G": GROUP, "DV": D, "HAS_SINKS": True, "BLOCK_S": module.MERGED, "BLOCK_V": D}
    elif name.startswith("quantize"):
        module = compiled_kernel("quantize")
        kernel, options = module.quantize_kernel, module.OPTIONS
        types = {"x": "*bf16", "codes": "*u8", "refused": "*i32", "tokens": "i32"}
        types |= dict.fromkeys(("channel_scale", "scale", "zero"), "*fp16") | {"row_tokens": "i32"}
        number: Any = name.split()[1]
        per_channel = name.endswith("channel")
        format = Format(number, "channel", 64) if per_channel else Format(number, "token")
        fixed = module.constants(format, D) | {"SEPARABLE": number == "int4" and not per_channel}
    elif name == "gather":
        module = compiled_kernel("compact")
        kernel, options = module.gather_kernel, module.OPTIONS
        types = {"source": "*bf16", "pool": "*bf16", "row_stride": "i64", "token_stride": "i64"}
        types |= dict.fromkeys(("kept", "ranges", "offsets"), "*i32")
        fixed = {"D": D, "BLOCK_T": module.TILE // D, "BLOCK_D": D}
    else:
        module = compiled_kernel("compact")
        kernel, options = module.append_kernel, module.OPTIONS
        types = dict.fromkeys(("keys", "values", "new_keys", "new_values"), "*bf16")
        types |= {"offsets": "*i32", "lengths": "*i32", "T": "i32"}
        fixed = {"D": D, "DV": D, "BLOCK_D": D, "BLOCK_V": D}
    code = machine_code(kernel, types, fixed, options)
    assert code.spilled == 0
    assert code.registers <= OTHERS[name]


@pytest.mark.parametrize("name", ["log_sum_kernel", "column_sum_kernel"])
def test_column_sums(
    compiled_kernel: Callable[[str], Any], machine_code: Callable[..., Any], name: str
) -> None:
    module = compiled_kernel("column_sums")
    types = {"query": "*bf16", "key": "*bf16", "log_sum": "*fp32", "out": "*fp32"}
    types |= {"scale": "fp32", "T": "i32", "S": "i32"}
    fixed = {"G": GROUP, "D": D, "TYPE": module.TYPES[torch.bfloat16], "PRECISION": "tf32"}
    fixed |= {"BLOCK_Q": module.QUERIES, "BLOCK_S": module.KEYS, "BLOCK_D": D}
    code = machine_code(getattr(module, name), types, fixed, module.OPTIONS)
    assert code.spilled == 0
    assert code.registers <= 168
    assert {"HMMA", "HGMMA"}.intersection(code.loop)
