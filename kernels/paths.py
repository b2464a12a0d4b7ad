"""Which implementation of an operation runs on a device, and why."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import torch

from cacheplan.kernels.decode_attention import cpu_int8

Name = Literal["triton", "naive"]
FUSED = (torch.float16, torch.bfloat16, torch.float32)  # what the Triton kernels compute


@dataclass(frozen=True)
class Path:
    """An implementation, and a clause that says why it is this one."""

    name: Name
    why: str


@dataclass(frozen=True)
class Operation:
    """A row of the table of `paths`; `name` and `implementation` are words for people."""

    name: str
    implementation: str
    why: str


@functools.cache
def triton_version() -> str | None:
    """The version of the package triton, None where it is not installed."""
    return None if find_spec("triton") is None else str(import_module("triton").__version__)


def choose(device: torch.device | str, dtype: torch.dtype = torch.float32) -> Path:
    """Triton on CUDA, plain torch elsewhere: what every dispatcher asks."""
    if torch.device(device).type != "cuda":
        return Path("naive", "Triton's kernels need a CUDA device")
    if dtype not in FUSED:
        return Path("naive", f"Triton's kernels do not compute in {dtype}")
    version = triton_version()
    if version is None:
        return Path("naive", "the package triton is not installed")
    return Path("triton", f"CUDA with Triton {version}")


def paths(device: torch.device | str, dtype: torch.dtype = torch.float32) -> tuple[Operation, ...]:
    """What each operation takes on a device, for tensors of a dtype."""
    fused = choose(device, dtype)

    def row(name: str, otherwise: str, only: str = "") -> Operation:
        if fused.name == "naive":
            return Operation(name, otherwise, fused.why)
        return Operation(name, "Triton", f"{fused.why}{only}")

    return (
        Operation("attention of several new tokens", "torch SDPA", "packed tokens are unpacked"),
        Operation("attention of one token, rows alike", "torch SDPA", "one call reads all rows"),
        row("attention of one token, ragged rows", "torch SDPA, row by row"),
        row("attention of one token, packed rows", "plain torch"),
        _int8(torch.device(device)),
        row("packing into few bits", "plain torch"),
        row("keeping and appending tokens", "plain torch"),
        row("accumulated attention", "plain torch", "; plain torch up to 128 queries"),
        row("forecasts of features", "plain torch"),
    )


def _int8(device: torch.device) -> Operation:
    name = "attention of one token, int8 by channel"
    if device.type != "cpu":
        return Operation(name, "none", "torch's int8 products are those of CPUs")
    if not cpu_int8.available():
        return Operation(name, "none", "torch's int8 product is missing or wrong on this processor")
    return Operation(name, "torch's int8 products", "they are right on this processor")
