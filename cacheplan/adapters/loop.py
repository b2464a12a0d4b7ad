"""Where a pipeline is in its sampling loop: run, step, denoiser and branch of each call.

Steps are counted, never read off timesteps: second-order solvers repeat those.  A step ends with
a call of `scheduler.step`; a run begins with the first denoiser call after `set_timesteps`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from cacheplan.adapters.calls import timestep, unwrapped
from cacheplan.adapters.clock import Clock, late_start
from cacheplan.adapters.taps import Watched, intercepted, replaced
from cacheplan.errors import UnsupportedError

DENOISERS = ("transformer", "transformer_2", "unet")

# around a call: loop, what computes it, args, kwargs -> output
Around = Callable[["Loop", Any, tuple[Any, ...], dict[str, Any]], Any]


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by component name, in the order in which they take over."""
    found: dict[str, nn.Module] = {}
    for name in DENOISERS:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module) and module not in found.values():
            found[name] = module
    if not found:
        raise UnsupportedError(
            f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}, "
            "so there is no denoiser to plan for."
        )
    return found


class Loop:
    """The place in the sampling loop, as of the present call of a denoiser or of the scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.run = 0  # runs begun so far
        self.step = 0  # calls of scheduler.step in this run
        self.call = 0  # denoiser calls of this step, before the present one
        self.denoiser = ""  # component name of the one that is called
        self.module: Any = None  # and the module itself
        self.branch = ""  # the pipeline's own name of this call ("cond"), else "call 0", "call 1"
        self.timesteps: tuple[float, ...] = ()
        self.sigmas: tuple[float, ...] = ()  # one more than timesteps: the last is the end
        self._context = ""
        self._branches: list[str] = []  # of this step so far
        self._clock: Clock | None = None  # None between set_timesteps and the first call
        self._ready = False  # set_timesteps has been called

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def index(self, branches: Sequence[str]) -> int:
        """The position of the present call among `branches`, as `DiffusionSpec` names them."""
        if len(branches) == 1 and self.call == 0:
            return 0
        if self.branch in branches:
            return branches.index(self.branch)
        raise UnsupportedError(
            f'The denoiser is called for "{self.branch}" at step {self.step}, but was profiled '
            f"with the calls {', '.join(branches)}: use the guidance settings of the profile."
        )

    def _prepare(self) -> None:
        self.step = self.call = 0
        self._branches = []
        self._clock = None
        self._ready = True

    def _enter(
        self, name: str, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Take note of a denoiser's call; True if a run begins with it."""
        begins = self._clock is None
        if not self._ready or (not begins and self.step >= self.steps):
            raise UnsupportedError(
                "The denoiser is called outside of a sampling loop, but plans count the steps of "
                "one: call the pipeline, not its parts."
            )
        if self._clock is None:
            self._clock = self._begin(denoiser)
        given = timestep(denoiser, args, kwargs)
        if self.call == 0 and given is not None:  # reading it waits for the device: once a step
            self._clock.check(self.step, given)
        branch = self._context or f"call {self.call}"
        repeats = self._branches.count(branch)
        self._branches.append(branch)
        self.branch = f"{branch} {repeats}" if repeats else branch
        self.denoiser, self.module = name, denoiser
        return begins

    def _begin(self, denoiser: Any) -> Clock:
        self.run += 1
        self.timesteps = tuple(map(float, torch.as_tensor(self.scheduler.timesteps).tolist()))
        self.sigmas = _sigmas(self.scheduler, self.timesteps)
        start = getattr(self.scheduler, "begin_index", None)
        if start:
            raise late_start(start, self.steps)
        train_steps = self.scheduler.config.get("num_train_timesteps", 1000)
        scale = getattr(unwrapped(denoiser), "config", {}).get("timestep_scale", 1.0)
        return Clock(self.timesteps, train_steps, scale)

    def _advance(self) -> None:
        self.step += 1
        self.call = 0
        self._branches = []

    def _naming(self, cache_context: Any) -> Any:
        @functools.wraps(cache_context)
        @contextmanager
        def named(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            before, self._context = self._context, name
            try:
                with cache_context(name, *args, **kwargs):
                    yield
            finally:
                self._context = before

        return named


def _sigmas(scheduler: Any, timesteps: tuple[float, ...]) -> tuple[float, ...]:
    """Noise levels of the steps and of the end; timesteps for schedulers that have none."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(timesteps) + 1:
        return tuple(map(float, torch.as_tensor(sigmas).tolist()))
    return (*timesteps, min(0.0, timesteps[-1] - 1))


@contextmanager
def watching(
    pipe: Any,
    *,
    on_start: Callable[[Loop], None] | None = None,
    on_call: Around | None = None,
    on_step: Around | None = None,
) -> Iterator[Loop]:
    """Follow a pipeline's sampling loop while the context lasts.

    `on_start` is told of each run, just before its first denoiser call.  `on_call` stands around
    the denoisers' calls and `on_step` around the scheduler's steps: each gets the loop, what
    computes the output, args and kwargs, and returns the output.  Raises UnsupportedError where
    steps cannot be counted: a run that starts late, timesteps that are not the scheduler's, calls
    outside of the loop.
    """
    loop = Loop(pipe.scheduler)

    def prepared(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        loop._prepare()
        return inner(*args, **kwargs)

    def stepped(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not loop.call:
            raise UnsupportedError(
                "The scheduler steps without a call of the denoiser, but plans follow loops whose "
                "steps all have one."
            )
        output = on_step(loop, inner, args, kwargs) if on_step else inner(*args, **kwargs)
        loop._advance()
        return output

    def called(
        name: str, module: nn.Module, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if loop._enter(name, module, args, kwargs) and on_start:
            on_start(loop)
        output = on_call(loop, inner, args, kwargs) if on_call else inner(*args, **kwargs)
        loop.call += 1
        return output

    methods = {"set_timesteps": prepared, "step": stepped}
    watched = {name: Watched(pipe.scheduler, name, around) for name, around in methods.items()}
    with ExitStack() as stack:
        stack.enter_context(replaced(pipe.scheduler, watched))
        for name, module in denoisers(pipe).items():
            stack.enter_context(intercepted(module, functools.partial(called, name, module)))
            if hasattr(module, "cache_context"):
                context = {"cache_context": loop._naming(module.cache_context)}
                stack.enter_context(replaced(module, context))
        yield loop
