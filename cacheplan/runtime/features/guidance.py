"""Whether a run is guided as strongly as the plan's: features change with the guidance.

Most pipelines say what scale they were called with.  Of the others it is read off the first step,
where the scheduler is given `u + scale (c - u)` for the denoiser's two outputs u and c.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cacheplan.errors import UnsupportedError
from cacheplan.types import DiffusionSpec

ALIKE = 1e-2  # relative: half precision
_SETTING = "guidance_scale"


class Guidance:
    """Compares a run's scale with the plan's; says nothing where it cannot be seen."""

    def __init__(self, spec: DiffusionSpec, pipe: Any) -> None:
        self.pipe = pipe
        planned = json.loads(spec.call).get(_SETTING)
        self.planned = float(planned) if isinstance(planned, int | float) else None
        self.wanted = False  # the outputs of the first step
        self._outputs: list[Tensor] = []

    def start(self) -> None:
        """A run begins; raises UnsupportedError if the pipeline was called with another scale."""
        told = getattr(self.pipe, _SETTING, None)
        self.wanted = self.planned is not None and not isinstance(told, int | float)
        self._outputs = []
        if not self.wanted:
            self._compare(told)

    def see(self, output: Tensor) -> None:
        """Take note of what a call of the first step returned."""
        self._outputs.append(output)

    def check(self, given: Any) -> None:
        """UnsupportedError if `given`, with which the scheduler steps, has another scale."""
        outputs, self._outputs, self.wanted = self._outputs, [], False
        if isinstance(given, Tensor):
            found = combined(outputs, given)
            # which of the two comes first differs, but scales are mostly above 1
            if found is not None and not self._alike(min(found, 1 - found)):
                self._compare(round(max(found, 1 - found), 3))

    def _alike(self, found: float) -> bool:
        return self.planned is None or math.isclose(
            found, self.planned, rel_tol=ALIKE, abs_tol=ALIKE
        )

    def _compare(self, found: float | None) -> None:
        if found is not None and not self._alike(found):
            raise UnsupportedError(
                f"The run has guidance scale {found:g}, but the plan was made for "
                f"{self.planned:g}: use that, or profile with the one you want."
            )


def combined(outputs: Sequence[Tensor], given: Tensor) -> float | None:
    """The s of `given = a + s (b - a)` for the two halves a and b of `outputs`.

    `given` may come twice in a row.  None if there are not two halves, or if it is something else.
    """
    rows = given.shape[0]
    if rows % 2 == 0 and given[: rows // 2].equal(given[rows // 2 :]):
        rows //= 2
        given = given[:rows]
    halves = [o[first : first + rows] for o in outputs for first in range(0, len(o), rows)]
    if len(halves) != 2 or halves[0].shape[2:] != given.shape[2:] or not given.dim() > 1:
        return None
    # a learned variance comes behind the other channels
    a, b = (half[:, : given.shape[1]].double() for half in halves)
    if a.shape != given.shape or b.shape != given.shape:
        return None
    apart, moved = b - a, given.double() - a
    size = float(apart.square().sum())
    if not size > ALIKE**4 * float(a.square().sum()):
        return None
    scale = float((moved * apart).sum()) / size
    rest = float((moved - scale * apart).square().sum())
    return scale if rest <= ALIKE**2 * float(moved.square().sum()) else None
