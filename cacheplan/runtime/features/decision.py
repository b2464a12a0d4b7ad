"""Whether the present step is computed: as planned, or because the gate promotes it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cacheplan.runtime.features.blocks import RUN
from cacheplan.runtime.features.gate import MODULATION, Guard
from cacheplan.runtime.features.program import Program
from cacheplan.runtime.features.wiring import Wiring


class Decision:
    """One per step, made at its first call of the denoiser; without a gate the plan's own."""

    def __init__(self, program: Program, guard: Guard | None) -> None:
        self.program, self.guard = program, guard
        self.promoted = False  # a planned skip is computed
        self._undecided = False  # until the first blocks have run
        self._step = 0
        self._given: Tensor | None = None  # hidden states at the first block

    @property
    def computed(self) -> bool:
        """Whether nothing is left out at the step."""
        return self.promoted or not self.program.actions[self._step]

    @property
    def bytes(self) -> int:
        return self.guard.bytes if self.guard else 0

    def reset(self) -> None:
        """A run begins, or another denoiser takes over."""
        self.promoted = self._undecided = False
        self._given = None
        if self.guard:
            self.guard.reset()

    def begin(self, step: int, latent: Tensor) -> None:
        """Decide as far as possible before the denoiser runs."""
        self._step, self.promoted, self._undecided = step, False, False
        if self.guard is None:
            return
        outside = self.guard.outside
        if self.program.actions[step]:
            if self.guard.forbids(step):
                self.promoted = True
            elif outside:
                self.promoted = not self.guard.allows(outside.measure(latent))
            else:
                self._undecided = True
        if outside:
            outside.see(latent)

    def arm(self, wiring: Wiring, compute: Callable[[], None]) -> None:
        """Let the first blocks of the step's first call report; `compute` sets up a promotion."""
        if self.guard is None or self.guard.inside is None:
            return
        guard, signal, step = self.guard, self.guard.inside, self._step

        def decide(given: Tensor, returned: Tensor) -> None:
            if self._undecided:
                self._undecided = False
                self.promoted = not guard.allows(signal.measure(given, returned, step))
                if self.promoted:
                    compute()
            if self.computed:
                signal.learn(given, returned, step)

        probed = [wiring.of_block[index] for index in wiring.blocks[: guard.gate.blocks]]
        if guard.gate.signal == MODULATION:
            probed[0].peek = True
            wiring.need_attention().probe = lambda given: decide(given, given)
            return
        for handler in probed:
            handler.mode = RUN  # also where all blocks are left out

        def enter(given: Tensor, returned: Tensor) -> None:
            self._given = given

        def leave(given: Tensor, returned: Tensor) -> None:
            first = given if self._given is None else self._given
            self._given = None
            decide(first, returned)

        probed[0].probe = enter
        probed[-1].probe = leave

    def learn(self, latent: Tensor, output: Tensor) -> None:
        """Take note of the step's first call."""
        if self.guard and self.guard.outside and self.computed:
            self.guard.outside.learn(latent, output)

    def finish(self) -> None:
        """The step is over."""
        if self.guard:
            self.guard.passed(skipped=not self.computed)
