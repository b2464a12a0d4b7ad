"""The weighted sum of features: naive against NumPy, Triton against naive, and its machine code.

Without a GPU, Triton runs in its interpreter.  That is chosen when a kernel is decorated, so the
tests import copies of the module: one under TRITON_INTERPRET=1, one without for the compiler.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cacheplan.kernels import paths
from cacheplan.kernels.forecast import dispatch, naive

FILE = Path(__file__).parents[2] / "kernels" / "forecast" / "triton.py"
GUARD = 2048  # more than a block, so that a stray access meets NaN and not another tensor
WEIGHTS = (1.9, -1.3, 0.7, -0.11)
FLAGS = [(s, h, a) for s in (False, True) for h in (False, True) for a in (False, True)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EVERYTHING = (True, True, True)

Arguments = tuple[list[Tensor], tuple[float, ...], Tensor | None, Tensor | None, Tensor | None]


def load(*, interpret: bool) -> Any:
    """A copy of the kernel's module, decorated for the interpreter or for the compiler."""
    pytest.importorskip("triton")  # first, so that Triton's own functions stay compiled ones
    spec = importlib.util.spec_from_file_location(f"forecast_interpreted_{interpret}", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def interpreted() -> Any:
    return load(interpret=True)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs start as NaN between two stretches of NaN, which must be there at the end."""
    buffers: list[Tensor] = []

    def empty_like(tensor: Tensor) -> Tensor:
        buffers.append(torch.full((tensor.numel() + 2 * GUARD,), torch.nan, dtype=tensor.dtype))
        return buffers[-1][GUARD:-GUARD].view(tensor.shape)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    yield
    assert buffers
    for buffer in buffers:
        assert buffer[:GUARD].isnan().all()
        assert buffer[-GUARD:].isnan().all()
        assert not buffer[GUARD:-GUARD].isnan().any()


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random numbers in memory that is NaN before and after them."""
    values = torch.randn(shape)
    buffer = torch.full((values.numel() + 2 * GUARD,), torch.nan, dtype=dtype)
    buffer[GUARD : GUARD + values.numel()] = values.flatten().to(dtype)
    return buffer[GUARD : GUARD + values.numel()].view(shape)


def arguments(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    features: int = 3,
    flags: tuple[bool, bool, bool] = EVERYTHING,
) -> Arguments:
    scale, shift, add = flags
    return (
        [poisoned(*shape, dtype=dtype) for _ in range(features)],
        WEIGHTS[:features],
        poisoned(shape[-1], dtype=torch.float32) if scale else None,
        poisoned(shape[-1], dtype=dtype) if shift else None,
        poisoned(*shape, dtype=dtype) if add else None,
    )


def assert_interpreted(found: Tensor, expected: Tensor) -> None:
    """The same bits; only for bfloat16 the interpreter truncates where devices round."""
    assert found.dtype == expected.dtype
    bfloat16 = found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7 if bfloat16 else 0.0, atol=0.0)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("features", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_naive_is_the_formula(
    dtype: torch.dtype, features: int, flags: tuple[bool, bool, bool]
) -> None:
    given, weights, *others = arguments((2, 5, 7), dtype, features=features, flags=flags)
    exact = [None if tensor is None else tensor.double().numpy() for tensor in others]
    wide = np.stack([feature.double().numpy() for feature in given])
    expected = np.tensordot(np.array(weights), wide, 1)
    size = np.tensordot(np.abs(weights), np.abs(wide), 1)  # for sums that cancel
    scale, shift, add = exact
    if scale is not None:
        expected, size = expected * scale, size * np.abs(scale)
    for term in (shift, add):
        if term is not None:
            expected, size = expected + term, size + np.abs(term)
    found = naive.combine(given, weights, *others)
    assert found.dtype == dtype
    rounding = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-6 + torch.finfo(dtype).eps)
    assert (np.abs(found.double().numpy() - expected) <= rounding * size).all()


def test_a_float32_accumulator_keeps_what_cancels() -> None:
    features = [torch.tensor([1.0], dtype=torch.bfloat16)] * 2
    found = naive.combine(features, (1000.125, -1000.0))
    assert found.item() == 0.125


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_feature_of_weight_one_is_itself(interpreted: Any, dtype: torch.dtype) -> None:
    feature, add = torch.randn(3, 5).to(dtype), torch.randn(3, 5).to(dtype)
    for combine in (naive.combine, interpreted.combine, dispatch.combine):
        assert combine([feature], (1.0,)) is feature
    assert torch.equal(naive.combine([feature], (1.0,), add=add), feature + add)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("features", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_is_naive(
    interpreted: Any, dtype: torch.dtype, features: int, flags: tuple[bool, bool, bool]
) -> None:
    given = arguments((3, 11, 37), dtype, features=features, flags=flags)  # two blocks
    assert_interpreted(interpreted.combine(*given), naive.combine(*given))


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(
    "shape",
    [(1,), (7,), (1, 1), (5, 1), (2, 3, 17), (1023,), (1, 1024), (1, 1025), (2, 1500), (1, 3071)],
    ids=str,
)
def test_triton_at_odd_sizes(interpreted: Any, shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        given = arguments(shape, dtype)
        assert_interpreted(interpreted.combine(*given), naive.combine(*given))


@pytest.mark.usefixtures("guarded")
def test_triton_with_wide_indices(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreted, "NARROW", 0)
    given = arguments((3, 11, 37), torch.float32)
    assert_interpreted(interpreted.combine(*given), naive.combine(*given))


def test_triton_on_strided_inputs(interpreted: Any) -> None:
    features = [
        torch.randn(13, 4, 9).transpose(0, 1),
        torch.randn(4, 26, 9)[:, ::2],
        torch.randn(9).expand(4, 13, 9),
        torch.randn(4, 13, 10)[..., 1:],
    ]
    scale, shift = torch.randn(18)[::2], torch.randn(1).expand(9)
    add = torch.randn(9, 13, 4).permute(2, 1, 0)
    found = interpreted.combine(features, WEIGHTS, scale, shift, add)
    assert found.is_contiguous()
    assert_interpreted(found, naive.combine(features, WEIGHTS, scale, shift, add))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
def test_empty_tensors(
    interpreted: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreted, "combine_kernel", None)  # CUDA has no empty launch
    given = arguments(shape, torch.float16)
    for found in (naive.combine(*given), interpreted.combine(*given)):
        assert found.shape == shape
        assert found.dtype == torch.float16


def test_inputs_stay_as_they_are(interpreted: Any) -> None:
    features, weights, scale, shift, add = arguments((5, 7), torch.float32)
    tensors = [*features, scale, shift, add]
    before = [tensor.clone() for tensor in tensors if tensor is not None]
    for combine in (naive.combine, interpreted.combine):
        combine(features, weights, scale, shift, add)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True) if b is not None)


def test_what_does_not_fit_is_refused(interpreted: Any) -> None:
    one, channels = torch.randn(3, 5), torch.randn(5)
    wrong: list[Any] = [
        ([one] * 5, [1.0] * 5),
        ([one], [1.0, 2.0]),
        ([one, one[:2]], [1.0, 2.0]),
        ([one, one.half()], [1.0, 2.0]),
        ([one], [1.0], channels[:4]),
        ([one], [1.0], None, channels[:1]),
        ([one], [1.0], None, None, channels),
    ]
    for combine in (naive.combine, interpreted.combine):
        for given in wrong:
            with pytest.raises(AssertionError):
                combine(*given)
    with pytest.raises(AssertionError, match="float32"):
        interpreted.combine([one.double()], [2.0])


def test_the_path_is_told_and_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments((3, 5), torch.float32)
    assert dispatch.path("cpu") == "naive"
    assert torch.equal(dispatch.combine(*given), naive.combine(*given))
    monkeypatch.setattr(paths, "triton_version", lambda: "3.9")
    assert dispatch.path(torch.device("cuda", 1)) == "triton"
    assert dispatch.path("cuda", torch.float64) == "naive"
    monkeypatch.setattr(paths, "triton_version", lambda: None)
    assert dispatch.path("cuda") == "naive"


def test_an_error_of_triton_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "path", lambda device, dtype: "triton")
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "cacheplan.kernels.forecast.triton", raising=False)
    monkeypatch.delattr(sys.modules["cacheplan.kernels.forecast"], "triton", raising=False)
    with pytest.raises(ImportError):
        dispatch.combine(*arguments((3, 5), torch.float32))


def test_the_dispatch_imports_no_triton() -> None:
    code = (
        "import sys, torch; from cacheplan.kernels.forecast.dispatch import combine;"
        "combine([torch.ones(3)], [2.0]); print('cacheplan.kernels.forecast.triton' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_on_a_gpu(dtype: torch.dtype) -> None:
    for shape in [(7,), (3, 11, 37), (2, 1152, 1152)]:
        features, weights, *others = arguments(shape, dtype)
        on_gpu = [None if tensor is None else tensor.cuda() for tensor in others]
        found = dispatch.combine([feature.cuda() for feature in features], weights, *on_gpu)
        expected = naive.combine(features, weights, *others)
        torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize(
    ("element", "features", "flags", "wide"),
    [
        ("bf16", 1, (False, False, True), False),
        ("bf16", 4, EVERYTHING, False),
        ("bf16", 4, EVERYTHING, True),
        ("fp16", 2, (True, True, False), False),
        ("fp32", 3, EVERYTHING, False),
    ],
)
def test_machine_code_for_hopper(
    element: str,
    features: int,
    flags: tuple[bool, bool, bool],
    wide: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiled for sm_90 without a GPU: 16-byte accesses, each once; no spills, no fused sums."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module = load(interpret=False)
    scale, shift, add = flags
    constants = {
        "FEATURES": features,
        "HAS_SCALE": scale,
        "HAS_SHIFT": shift,
        "HAS_ADD": add,
        "WIDE": wide,
        "BLOCK": module.BLOCK,
    }
    types = dict.fromkeys(("out", "F0", "F1", "F2", "F3", "add"), f"*{element}")
    types |= dict.fromkeys(("scale", "shift"), "*fp32")
    types |= dict.fromkeys(("w0", "w1", "w2", "w3"), "fp32")  # run-time values
    types |= {"n": "i64" if wide else "i32", "C": "i32"} | dict.fromkeys(constants, "constexpr")
    names = module.combine_kernel.arg_names
    aligned = [i for i, name in enumerate(names) if types[name][0] in "*i"]
    source = ASTSource(
        module.combine_kernel,
        {name: types[name] for name in names},
        constants,
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options=module.OPTIONS,
    )
    ptx = compiled.asm["ptx"]
    assert ".target sm_90" in ptx
    assert "fma" not in ptx
    per_thread = module.BLOCK // (32 * module.OPTIONS["num_warps"])
    vectors = per_thread * int(element[2:]) // 128  # loads of 16 bytes, per thread and tensor
    channels = (scale + shift) * per_thread * 32 // 128
    found = re.findall(r"\b(?:ld|st)\.(?:global|local)\S*", ptx)
    assert len(found) == len(re.findall(r"@%p\d+ (?:ld|st)\.global", ptx))  # all are masked
    assert found.count("ld.global.v4.b32") == (features + add) * vectors + channels
    assert found.count("st.global.v4.b32") == vectors
    assert len(found) == (features + add + 1) * vectors + channels  # and nothing else

    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "kernel.cubin"]
    run = subprocess.run(
        command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=True
    )
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run.stdout))
    assert usage["STACK"] == usage["LOCAL"] == "0", usage
    assert int(usage["REG"]) <= 64, usage  # enough for 32 warps per multiprocessor
