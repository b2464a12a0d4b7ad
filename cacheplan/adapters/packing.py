"""From a plan's precision to the kernels' format."""

from __future__ import annotations

from typing import Any

from cacheplan.kernels.quantize.packed import Format
from cacheplan.plans.storage import packed
from cacheplan.types import Precision


def packing(precision: Precision) -> Format | None:
    """How the kernels pack numbers of this precision; None where they stay as they are."""
    if not packed(precision):
        return None
    number: Any = "fp8" if precision.format == "float" else f"int{precision.bits}"
    axis: Any = precision.axis
    return Format(number, axis, precision.group, precision.separable)
