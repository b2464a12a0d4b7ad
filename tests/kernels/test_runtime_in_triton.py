"""Caches whose kernels are Triton's, in the interpreter, against what a CPU runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cacheplan.adapters.attention import Step
from cacheplan.kernels import paths
from cacheplan.kernels.column_sums import dispatch as column_sums
from cacheplan.kernels.compact import dispatch as compact
from cacheplan.kernels.decode_attention import dispatch
from cacheplan.kernels.decode_attention.segments import Segment, divide
from cacheplan.kernels.quantize import dispatch as quantize
from cacheplan.kernels.quantize.naive import quantize as naive
from cacheplan.kernels.quantize.packed import Format
from cacheplan.runtime import PlanCache, apply
from cacheplan.runtime.attending import attend
from cacheplan.runtime.rows import RaggedRows
from cacheplan.scorers.attention import accumulated_attention
from cacheplan.scorers.seen import Seen
from cacheplan.types import AccumulatedAttention, KeyNorm, KVAction, Merge, Precision

OPERATIONS = ("decode_attention", "compact", "column_sums", "quantize")
Forced = Callable[[], AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def in_triton(interpreted_kernel: Callable[[str], Any]) -> Forced:
    """`with in_triton():` every dispatcher takes Triton, in the interpreter."""
    modules = {name: interpreted_kernel(name) for name in OPERATIONS}
    patched = pytest.MonkeyPatch()

    class Forcing(AbstractContextManager[Any]):
        def __enter__(self) -> None:
            for name, module in modules.items():
                package = import_module(f"cacheplan.kernels.{name}")
                patched.setitem(sys.modules, f"{package.__name__}.triton", module)
                patched.setattr(package, "triton", module, raising=False)
            patched.setattr(paths, "choose", lambda *_: paths.Path("triton", "it is tested"))

        def __exit__(self, *_: object) -> None:
            patched.undo()

    return Forcing


def ids(tokens: int, batch: int = 1, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 97, (batch, tokens), generator=generator)


PLAIN = KVAction(keep=0.5, scorer=KeyNorm(), sinks=2, recent=4)
K4 = Precision(format="int", bits=4, axis="channel", group=32)
V4 = Precision(format="int", bits=4, axis="token")
COUNTED = KVAction(keep=0.4, scorer=AccumulatedAttention(), losers="merge", merge=Merge(), recent=3)
ACTIONS: dict[str, Any] = {
    "per head": {
        (layer, head): replace(PLAIN, keep=0.3 + 0.2 * head + 0.1 * layer)
        for layer in range(3)
        for head in range(2)
    },
    "counted": COUNTED,
    "few bits": {
        (layer, head): replace(PLAIN, key=K4, value=V4) if (layer + head) % 2 else PLAIN
        for layer in range(3)
        for head in range(2)
    },
}


def logits(model: Any, plan: Any, steps: list[int]) -> tuple[Tensor, PlanCache]:
    """Of a batch of two texts, one of them padded, and after every step of so many tokens."""
    lengths, longest = (57, 90), 90
    prompt, mask = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest)
    for b, n in enumerate(lengths):
        prompt[b, longest - n :], mask[b, longest - n :] = ids(n, seed=b)[0], 1
    cache, found = PlanCache(plan), []
    with apply(model, plan), torch.no_grad():
        for part in (prompt, *torch.split(ids(sum(steps), 2, seed=9), steps, 1)):
            if part is not prompt:
                mask = torch.cat([mask, torch.ones(part.shape)], 1)
            place = (mask.cumsum(-1) - 1).clamp(min=0).long()[:, -part.shape[1] :]
            out = model(part, attention_mask=mask, position_ids=place, past_key_values=cache)
            found.append(out.logits[:, -1])
    return torch.stack(found), cache


@pytest.mark.parametrize(
    ("name", "steps", "way", "tolerance"),
    [
        ("per head", [1, 58, *[1] * 12], "ragged attention in Triton in 3 layers", 1e-4),
        ("counted", [1] * 4, "ragged attention in Triton in 3 layers", 1e-4),
        ("few bits", [1, 60, *[1] * 6], "packed attention in Triton", 3e-2),
    ],
)
def test_a_model_under_a_plan(
    in_triton: Forced,
    tiny_llama: Any,
    make_plan: Any,
    name: str,
    steps: list[int],
    way: str,
    tolerance: float,
) -> None:
    """Past the step at which rows take new room, and older tokens are packed."""
    plan = make_plan(ACTIONS[name])
    expected, plain = logits(tiny_llama, plan, steps)
    with in_triton():
        found, cache = logits(tiny_llama, plan, steps)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    assert way in cache.path
    assert "Triton" not in plain.path
    assert (cache.lengths, cache.nbytes) == (plain.lengths, plain.nbytes)


@pytest.mark.parametrize("case", ["plain", "sinks", "softcap", "bias", "all"])
@pytest.mark.parametrize("ragged", [True, False])
def test_attention_over_rows(in_triton: Forced, case: str, ragged: bool) -> None:
    B, K, G, D = 2, 2, 3, 24
    rows = RaggedRows(torch.randn(B, K, 90, D), torch.randn(B, K, 90, D))
    keep = (90, 13, 70, 1) if ragged else (33, 33, 33, 33)
    rows.keep([torch.randperm(90)[:n].sort().values for n in keep])
    if case in ("bias", "all"):
        rows.bias = torch.rand(len(rows.keys)) * 3
    new = torch.randn(B, K, 1, D)
    rows.append(new, new)
    step = Step(
        SimpleNamespace(),  # type: ignore[arg-type]
        4 * torch.randn(B, K * G, 1, D),
        D**-0.5,
        sinks=torch.randn(K * G) if case in ("sinks", "all") else None,
        softcap=2.0 if case in ("softcap", "all") else None,
    )
    expected, _ = attend(rows, step)
    with in_triton():
        found, how = attend(rows, step)
        work = rows.work
        again, _ = attend(rows, step)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(found, again)
    if not ragged and case == "plain":
        assert (how, work) == ("SDPA over all rows", None)
    else:
        assert how == "ragged attention in Triton"
        assert work is rows.work, "the work is divided once"


def test_a_division_serves_until_rows_take_new_room(in_triton: Forced) -> None:
    """What a captured graph reads stays in its place: pools, lengths and work."""
    rows = RaggedRows(torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8))
    rows.keep([torch.arange(20), torch.arange(5)])
    step = Step(SimpleNamespace(), torch.randn(1, 2, 1, 8), 0.3)  # type: ignore[arg-type]
    with in_triton():
        seen = set()
        for _ in range(65):
            rows.append(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
            attend(rows, step)
            own = rows.segment
            tensors = own.keys, own.values, own.offsets, own.lengths
            seen.add((id(rows.work), *(t.data_ptr() for t in tensors if isinstance(t, Tensor))))
            assert own.lengths.tolist() == rows.lengths
    assert len(seen) == 2


@pytest.mark.parametrize("T", [129, 140])
@pytest.mark.parametrize("mean", [True, False])
def test_accumulated_attention(in_triton: Forced, T: int, mean: bool) -> None:
    key = torch.randn(1, 2, 140, 16)
    seen = Seen(torch.randn(1, 4, T, 16), key, key, 0.25)
    expected = accumulated_attention(AccumulatedAttention(mean=mean), seen)
    with in_triton():
        found = accumulated_attention(AccumulatedAttention(mean=mean), seen)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(found, expected), "sums in another order: the kernel has run"


def test_paths_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.float16
    assert paths.choose("cpu") == paths.Path("naive", "Triton's kernels need a CUDA device")
    monkeypatch.setattr(paths, "triton_version", lambda: None)
    assert paths.choose("cuda").why == "the package triton is not installed"
    monkeypatch.setattr(paths, "triton_version", lambda: "3.9")
    assert paths.choose("cuda:1", half) == paths.Path("triton", "CUDA with Triton 3.9")
    assert paths.choose("cuda", torch.float64).name == "naive"
    assert compact.path("cuda") == "triton"
    assert column_sums.path("cuda", half, 129, 128) == "triton"
    assert column_sums.path("cuda", half, 128, 128) == "naive"
    assert column_sums.path("cuda", torch.float32, 129, 129) == "naive"
    assert quantize.path("cuda", half, Format("int4", "token", 64), 128) == "triton"
    assert quantize.path("cuda", half, Format("int4", "token", 32), 128) == "naive"


def test_every_row_of_the_table_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "triton_version", lambda: "3.9")
    rows = {d: {row.name: row for row in paths.paths(d)} for d in ("cpu", "cuda")}
    assert rows["cpu"].keys() == rows["cuda"].keys()
    assert all(row.why for own in rows.values() for row in own.values())
    ragged = "attention of one token, ragged rows"
    assert rows["cpu"][ragged].implementation == "torch SDPA, row by row"
    assert rows["cuda"][ragged].implementation == "Triton"
    assert rows["cuda"]["attention of one token, int8 by channel"].implementation == "none"


def test_wide_tokens_stay_with_torch(in_triton: Forced) -> None:
    for channels, name in ((128, "triton"), (129, "naive")):
        plain, index = torch.randn(2, channels), torch.ones(1, dtype=torch.int32)
        with in_triton():
            assert dispatch.path(plain, [Segment(plain, plain, index, index)]) == name


def test_groups_that_are_no_tiles_stay_with_torch(in_triton: Forced) -> None:
    """int4 values in groups within a plane of bytes, which the kernel does not read."""
    index = torch.zeros(1, dtype=torch.int32)
    plain, query = torch.randn(32, 16), torch.randn(1, 2, 16)
    for group, name in ((8, "triton"), (4, "naive")):
        packed = naive(plain, Format("int4", "token", group))
        own = Segment(plain, packed, index, index + 32)
        work = partial(divide, [[32]], processors=1)
        with in_triton():
            assert dispatch.path(query, [own]) == name
            found = dispatch.decode_attention(query, [own], work, scale=0.3)
        expected = dispatch.decode_attention(query, [own], work, scale=0.3)
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
