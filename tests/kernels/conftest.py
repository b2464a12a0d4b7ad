"""Triton kernels without a GPU: run in the interpreter, or compiled for Hopper.

Which of the two is chosen when a kernel is decorated, so tests import copies of the modules.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

PARTS = ("kernel", "triton")  # the modules of an operation that hold decorated functions


def _copy(operation: str, *, interpret: bool) -> Any:
    pytest.importorskip("triton")  # first, so that Triton's own functions are compiled ones
    package = import_module(f"cacheplan.kernels.{operation}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
        names = [f"{package.__name__}.{part}" for part in PARTS]
        saved = {name: sys.modules.pop(name) for name in names if name in sys.modules}
        try:
            return import_module(names[-1])
        finally:
            for name, part in zip(names, PARTS, strict=True):
                sys.modules.pop(name, None)
                vars(package).pop(part, None)
                if name in saved:
                    sys.modules[name] = saved[name]
                    setattr(package, part, saved[name])


@pytest.fixture(scope="module")
def interpreted_kernel() -> Iterator[Callable[[str], Any]]:
    """`interpreted_kernel(operation)`: the operation's module `triton` in the interpreter.

    Triton's own reductions are decorated as its import found the environment, but the interpreter
    needs interpreted ones.  It also leaves its replacements in Triton's language where kernels call
    functions of theirs.  So the language is put back after the module's tests, for the compiler.
    """
    pytest.importorskip("triton")
    import_module("triton.experimental.gluon")  # launches import it, from what is compiled
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    core = tl.core
    spaces = (tl, core, tl.math, tl.standard, core.tensor, core.dtype, core.tensor_descriptor_base)
    saved = [(space, dict(vars(space))) for space in spaces]
    for space in (tl, tl.standard):
        for name, own in list(vars(space).items()):
            if isinstance(own, JITFunction):
                setattr(space, name, InterpretedFunction(own.fn))
    yield lambda operation: _copy(operation, interpret=True)
    for space, names in saved:
        for name, value in list(vars(space).items()):
            if name not in names:
                if isinstance(space, type):  # names new in a module are what its functions use
                    delattr(space, name)
            elif value is not names[name]:
                setattr(space, name, names[name])


@pytest.fixture(scope="session")
def compiled_kernel() -> Callable[[str], Any]:
    """`compiled_kernel(operation)`: the operation's module `triton` for the compiler."""
    return lambda operation: _copy(operation, interpret=False)


@dataclass(frozen=True)
class MachineCode:
    """What a kernel became for Hopper (sm_90), compiled without a GPU."""

    registers: int  # per thread
    spilled: int  # bytes of stack and local memory per thread
    shared: int  # bytes per program, dynamic
    loop: tuple[str, ...]  # instructions of the longest loop, without suffixes


@pytest.fixture
def machine_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MachineCode]:
    """`machine_code(kernel, types, constants, options)`; pointers are aligned to 16 bytes."""
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def run(
        kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
    ) -> MachineCode:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = kernel.arg_names
        types = types | dict.fromkeys(constants, "constexpr")
        aligned = [i for i, name in enumerate(names) if types[name][0] == "*"]
        source = ASTSource(
            kernel,
            {name: types[name] for name in names},
            constants,
            {(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _dump("--dump-resource-usage")))
        code = [
            (int(address, 16), text)
            for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", _dump("--dump-sass"))
        ]
        jumps = [(a, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for a, text in code]
        loops = [(int(to[1], 16), a) for a, to in jumps if to and int(to[1], 16) < a]
        start, end = max(loops, key=lambda loop: loop[1] - loop[0], default=(1, 0))
        return MachineCode(
            registers=int(usage["REG"]),
            spilled=int(usage["STACK"]) + int(usage["LOCAL"]),
            shared=compiled.metadata.shared,
            loop=tuple(
                re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]
                for address, text in code
                if start <= address <= end
            ),
        )

    def _dump(option: str) -> str:
        command = [triton.knobs.nvidia.cuobjdump.path, option, "kernel.cubin"]
        found = subprocess.run(
            command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=True
        )
        return found.stdout

    return run
