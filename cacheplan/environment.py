"""What decides a result besides its inputs: versions, device, command and date."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("cacheplan", "numpy", "scipy", "torch", "transformers")


def installed_versions(*others: str) -> tuple[tuple[str, str], ...]:
    """Python and the packages that decide results, and of `others` those installed, sorted."""
    found = [("python", platform.python_version())]
    for package in (*_PACKAGES, *others):
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return tuple(sorted(found))


def environment() -> dict[str, Any]:
    """What a benchmark's JSON says about where its numbers come from."""
    return {
        "command": " ".join(["python", *map(_named, sys.argv)]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{_processor()}, {os.cpu_count()} cores",
        "versions": dict(installed_versions("diffusers")),
    }


def _named(argument: str) -> str:
    """An argument as others can use it: of an absolute path only the name."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
