"""Guards: a planned skip is computed after all where a signal says that too much has changed.

There is one decision per step, made at the first call of the denoiser and followed by the others.
All signals are relative mean absolute differences over the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cacheplan.errors import UnsupportedError
from cacheplan.kernels.forecast.dispatch import combine
from cacheplan.plans.forecast import weights
from cacheplan.plans.rescale import rescaled
from cacheplan.types import Gate, Rescale

MODULATION = "modulation"
INSIDE = ("first_block", "forecast", MODULATION)  # known only once the first blocks run


class FirstBlock:
    """Change of what the first blocks add, since the last computed step.

    ParaAttention's First-Block Cache; with more blocks cache-dit's DBCache.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._last: Tensor | None = None

    @property
    def bytes(self) -> int:
        return _bytes([self._last])

    def measure(self, given: Tensor, returned: Tensor, step: int) -> float | None:
        return _distance(self._last, returned - given, over=self._last)

    def learn(self, given: Tensor, returned: Tensor, step: int) -> None:
        self._last = returned - given


class FirstForecast:
    """Error of a forecast of the first blocks' output (CG-Taylor, arXiv 2508.02240)."""

    def __init__(self, order: int, abscissae: tuple[float, ...]) -> None:
        self.order, self.abscissae = order, abscissae
        self.reset()

    def reset(self) -> None:
        self._seen: list[tuple[int, Tensor]] = []  # computed steps, newest first

    @property
    def bytes(self) -> int:
        return _bytes([output for _, output in self._seen])

    def measure(self, given: Tensor, returned: Tensor, step: int) -> float | None:
        if not self._seen:
            return None
        keys = [key for key, _ in self._seen]
        found = weights("taylor", self.order, keys, step, self.abscissae)
        forecast = combine([output for _, output in self._seen[: len(found)]], found)
        return _distance(forecast, returned, over=returned)

    def learn(self, given: Tensor, returned: Tensor, step: int) -> None:
        self._seen = [(step, returned.clone()), *self._seen[: self.order]]


class Modulation:
    """Change of the first block's modulated input since the step before, as one of the output.

    TeaCache (arXiv 2411.19108).  The modulated input is what the block's attention is given.
    """

    def __init__(self, curve: Rescale) -> None:
        self.curve = curve
        self.reset()

    def reset(self) -> None:
        self._before: Tensor | None = None

    @property
    def bytes(self) -> int:
        return _bytes([self._before])

    def measure(self, given: Tensor, returned: Tensor, step: int) -> float | None:
        change = _distance(self._before, given, over=self._before)
        self._before = given.clone()
        return None if change is None else rescaled(self.curve, change)

    def learn(self, given: Tensor, returned: Tensor, step: int) -> None:
        self._before = given.clone()


class Secant:
    """Change of the denoiser's output as expected from that of its latent (EasyCache).

    The ratio of the two is measured between the last two computed steps; the latent's change is
    that since the step before.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._ratio: Tensor | None = None
        self._computed: tuple[Tensor, Tensor] | None = None  # latent and output
        self._before: Tensor | None = None  # latent of the step before

    @property
    def bytes(self) -> int:
        return _bytes([*(self._computed or ()), self._before])

    def measure(self, latent: Tensor) -> float | None:
        if self._ratio is None or self._computed is None or self._before is None:
            return None
        change = _mean(latent - self._before) / _mean(self._computed[1])
        return float(self._ratio * change)

    def see(self, latent: Tensor) -> None:
        """Take note of the step's latent, whether it is computed or not."""
        self._before = latent.clone()

    def learn(self, latent: Tensor, output: Tensor) -> None:
        latent, output = latent.clone(), output.clone()
        if self._computed is not None:
            x, v = self._computed
            self._ratio = _mean(output - v) / _mean(latent - x)
        self._computed = latent, output


class Guard:
    """Decides, step by step, whether a planned skip is computed after all."""

    def __init__(self, gate: Gate, steps: int, abscissae: tuple[float, ...]) -> None:
        if gate.accumulate not in ("none", "sum"):
            raise UnsupportedError(
                f'The gate accumulates its signal as a "{gate.accumulate}", which cannot be run '
                "yet; supported is none or sum."
            )
        self.gate, self.steps = gate, steps
        self.inside: FirstBlock | FirstForecast | Modulation | None = None
        self.outside: Secant | None = None
        if gate.signal == "first_block":
            self.inside = FirstBlock()
        elif gate.signal == "forecast":
            self.inside = FirstForecast(gate.order, abscissae)
        elif gate.signal == MODULATION and gate.rescale is not None:
            self.inside = Modulation(gate.rescale)
        elif gate.signal == "secant":
            self.outside = Secant()
        else:
            raise UnsupportedError(
                f'The gate\'s signal is "{gate.signal}", which cannot be run yet; supported is '
                "first_block, forecast, modulation or secant."
            )
        self.reset()

    def reset(self) -> None:
        """A run begins, or another denoiser takes over."""
        self._row = 0  # steps skipped in a row
        self._sum = 0.0
        for signal in (self.inside, self.outside):
            if signal is not None:
                signal.reset()

    @property
    def bytes(self) -> int:
        return sum(signal.bytes for signal in (self.inside, self.outside) if signal is not None)

    def forbids(self, step: int) -> bool:
        """Whether the step must be computed whatever the signal says."""
        gate = self.gate
        return (
            step < gate.warmup
            or step >= self.steps - gate.protect_last
            or (gate.max_consecutive is not None and self._row >= gate.max_consecutive)
        )

    def allows(self, signal: float | None) -> bool:
        """Whether the step may be skipped; a signal that is not known yet, or NaN, says no."""
        if signal is None:
            return False
        self._sum += signal
        return (self._sum if self.gate.accumulate == "sum" else signal) < self.gate.threshold

    def passed(self, *, skipped: bool) -> None:
        """The step is over."""
        self._row = self._row + 1 if skipped else 0
        self._sum = self._sum if skipped else 0.0


def _mean(tensor: Tensor) -> Tensor:
    return tensor.abs().mean(dtype=torch.float32)


def _distance(a: Tensor | None, b: Tensor, *, over: Tensor | None) -> float | None:
    """Mean absolute difference, relative to the mean of `over`."""
    if a is None or over is None or a.shape != b.shape:
        return None
    return float(_mean(a - b) / _mean(over))


def _bytes(tensors: list[Tensor | None]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)
