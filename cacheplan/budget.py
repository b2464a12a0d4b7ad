"""What the user may write after `--budget`, and the fraction of the cache it means."""

from __future__ import annotations

import math
import re

from cacheplan.errors import InfeasibleError, InputError
from cacheplan.types import Budget, LanguageSpec

_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_FORMS = '"0.2" or "20%" of the cache kept, "512tok" per head, "2GiB", "3.2bits" or "5x" smaller'
_SHARES = '"0.4" or "40%" of the denoiser\'s FLOPs kept, or "2.5x" less'
_MEMORY = 'something like "64MiB" or "2GB"'
FULL_BITS = 16  # absolute budgets count the cache as 16-bit numbers


def parse_budget(text: str | float, spec: LanguageSpec, length: int) -> Budget:
    """Turn a budget into the kept fraction of a full cache of `length` tokens.

    Absolute budgets (bytes of one sequence, tokens per head) also set `max_rows`, so that they
    hold for longer prompts too.  Raises InputError for nonsense and InfeasibleError for budgets
    below one token per head.
    """
    asked, number, unit = _parts(text, _FORMS)
    heads = spec.rows
    row_bytes = spec.token_width * FULL_BITS // 8
    max_rows: int | None = None
    if unit == "":
        kept = number
    elif unit == "%":
        kept = number / 100
    elif unit == "bits":
        kept = number / FULL_BITS
    elif unit == "x":
        kept = 1 / number if number else math.inf
    elif unit == "tok":
        max_rows = int(number * heads)
        kept = min(1.0, max_rows / (heads * length))
    elif unit in _BYTES:
        max_rows = int(number * _BYTES[unit]) // row_bytes
        kept = min(1.0, max_rows / (heads * length))
    else:
        raise InputError(f'The budget "{asked}" has the unknown unit "{unit}": write {_FORMS}.')
    smallest = 1 / length
    if not 0 < kept <= 1 and max_rows is None:
        raise InputError(
            f'The budget "{asked}" would keep {kept:g} of the cache, expected more than 0 and at '
            f"most 1: write {_FORMS}."
        )
    if kept < smallest:
        raise InfeasibleError(
            f'The budget "{asked}" is less than one token per head of a {length}-token prompt: '
            f"the smallest feasible budget there is {heads * row_bytes} bytes or {smallest:.2g}."
        )
    return Budget(asked=asked, kept=kept, reached=kept, length=length, max_rows=max_rows)


def parse_compute_budget(text: str | float) -> Budget:
    """Turn a budget into the fraction of a denoiser's FLOPs that may remain; InputError."""
    asked, number, unit = _parts(text, _SHARES)
    if unit in ("tok", "bits", *_BYTES):
        raise InputError(
            f'The budget "{asked}" is in a unit for caches of language models, but that of a '
            f"diffusion model is computation: write {_SHARES}."
        )
    if unit not in ("", "%", "x"):
        raise InputError(f'The budget "{asked}" has the unknown unit "{unit}": write {_SHARES}.')
    inverse = 1 / number if number else math.inf
    kept = inverse if unit == "x" else number / 100 if unit == "%" else number
    if not 0 < kept <= 1:
        raise InputError(
            f'The budget "{asked}" would keep {kept:g} of the denoiser\'s FLOPs, expected more '
            f"than 0 and at most 1: write {_SHARES}."
        )
    return Budget(asked=asked, kept=kept, reached=kept)


def parse_bytes(text: str) -> int:
    """A number of bytes such as "64MiB"; InputError."""
    asked, number, unit = _parts(text, _MEMORY)
    if unit not in _BYTES:
        raise InputError(f'The memory "{asked}" has no unit of bytes: write {_MEMORY}.')
    return int(number * _BYTES[unit])


def _parts(text: str | float, forms: str) -> tuple[str, float, str]:
    """What was asked, its number and its unit."""
    asked = str(text).strip()
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z%]*)", asked)
    if match is None:
        raise InputError(f'The budget "{asked}" is not understood: write {forms}.')
    return asked, float(match[1]), match[2]
