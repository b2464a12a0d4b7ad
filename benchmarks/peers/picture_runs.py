"""Run a setting of any cache on prompts: its error against the full run, and its counted FLOPs.

Every setting starts from the same noise, one seed per prompt, on a pipeline of its own.  FLOPs are
torch's count of the denoiser's calls; a call that runs the same modules on as much as a counted one
is not counted again.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from picture_metrics import Distance, ssim
from torch import Tensor, nn

from cacheplan.adapters.flops import flop_counter
from cacheplan.adapters.loop import Loop, watching
from cacheplan.adapters.sampling import run_pipeline
from cacheplan.profilers.feature_prompts import PicturePrompt

BATCH = 8
TIMED = 3  # pictures
Ran = tuple[tuple[int, float], ...]  # modules in order, each with its inputs per prompt
Installed = Callable[[Any], AbstractContextManager[Any]]  # of the pipeline that will run


@dataclass(frozen=True)
class Setting:
    """One point of a method's curve.  `online` methods decide by what they see of the batch.

    Those get one prompt at a time, so that each prompt has its own decisions.
    """

    method: str
    knob: str
    install: Installed
    online: bool = False
    plain: bool = True  # all that counts as FLOPs is modules of the pipeline
    steps: int | None = None  # of the pipeline, if not the usual number


FULL = Setting("full run", "", lambda pipe: nullcontext())


@dataclass(frozen=True)
class Measured:
    """A setting on `n` prompts: lists have an entry per prompt."""

    compute: float  # counted FLOPs over those of the full run
    errors: list[float]  # |latent - full latent| / |full latent|
    squares: list[float]  # mean squared difference of the pictures, values from 0 to 1
    ssim: list[float]
    distance: float  # kernel distance to drawings of the same prompts


class Bench:
    """A pipeline, some prompts and what the full run makes of them."""

    def __init__(self, pipe: Any, call: dict[str, Any], prompts: Sequence[PicturePrompt]) -> None:
        self.pipe, self.call, self.prompts = pipe, call, list(prompts)
        size, channels = pipe.transformer.config.sample_size, pipe.transformer.config.in_channels
        self.noise = torch.cat(
            [
                torch.randn(
                    1, channels, size, size, generator=torch.Generator().manual_seed(p.seed)
                )
                for p in self.prompts
            ]
        )
        self.distance = Distance([prompt.text for prompt in self.prompts])
        self.known: dict[Ran, float] = {}  # FLOPs of calls of plain settings
        self.latents, self.flops = self._run(FULL)
        self.pictures = self._decode(self.latents)
        self.full = self.compared(self.latents, self.flops)

    def measure(self, setting: Setting, known: Measured | None = None) -> Measured:
        """`known` is the setting on other prompts, whose FLOPs are the same unless it is online."""
        flops = None if known is None or setting.online else known.compute * self.flops
        return self.compared(*self._run(setting, flops))

    def compared(self, latents: Tensor, flops: float) -> Measured:
        difference = (latents - self.latents).flatten(1).norm(dim=1)
        pictures = self._decode(latents)
        return Measured(
            compute=flops / self.flops,
            errors=(difference / self.latents.flatten(1).norm(dim=1)).tolist(),
            squares=(pictures - self.pictures).square().flatten(1).mean(1).tolist(),
            ssim=ssim(pictures, self.pictures).tolist(),
            distance=self.distance(pictures),
        )

    def cost(self, setting: Setting, repeat: int = 2) -> dict[str, float]:
        """CPU seconds per picture and the most memory that torch holds beyond its start, bytes.

        One picture at a time; the best of `repeat` times, since other processes can only add.
        """
        with self._installed(setting) as (pipe, _):
            best = []
            for index in range(len(self.prompts))[:TIMED]:
                times = []
                for _ in range(repeat):
                    started = time.process_time()
                    self._sample(pipe, [index], setting)
                    times.append(time.process_time() - started)
                best.append(min(times))
            seconds = sum(best) / len(best)
            return {"seconds": seconds, "bytes": _peak(lambda: self._sample(pipe, [0], setting))}

    def once(self, pipe: Any) -> None:
        """One run of all prompts on a pipeline of the caller's."""
        self._sample(pipe, list(range(len(self.prompts))), FULL)

    @contextmanager
    def _installed(self, setting: Setting) -> Iterator[tuple[Any, Tally]]:
        pipe = copy.deepcopy(self.pipe)  # hooks do not all come off again
        known = self.known if setting.plain else {}
        with _tally(pipe.transformer, known) as tally, setting.install(pipe):
            yield pipe, tally

    def _run(self, setting: Setting, flops: float | None = None) -> tuple[Tensor, float]:
        """Final latents, and FLOPs per prompt; those are counted unless they are given."""
        size = 1 if setting.online else BATCH
        order = list(range(len(self.prompts)))
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        latents, counted = [], 0.0
        with self._installed(setting) as (pipe, tally):
            for batch in batches:
                latents.append(self._sample(pipe, batch, setting, tally))
                if flops is None:
                    if not tally.known():
                        with tally.counting():  # one prompt will do: batches are no decision
                            self._sample(pipe, batch[:1], setting, tally)
                    counted += tally.total() * len(batch)
        return torch.cat(latents), counted / len(order) if flops is None else flops

    def _sample(
        self, pipe: Any, batch: list[int], setting: Setting, tally: Tally | None = None
    ) -> Tensor:
        steps = {} if setting.steps is None else {"num_inference_steps": setting.steps}
        texts = {"prompt": [self.prompts[index].text for index in batch]}
        call = {**self.call, **steps, **texts, "latents": self.noise[batch]}
        if tally is None:
            return _latent(pipe, call)
        tally.begin(len(batch))
        with watching(pipe, on_call=tally.call):
            return _latent(pipe, call)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        """Pictures from 0 to 1."""
        made = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample
        pictures: Tensor = (made / 2 + 0.5).clamp(0, 1)
        return pictures


def _latent(pipe: Any, call: dict[str, Any]) -> Tensor:
    latent: Tensor = run_pipeline(pipe, call, seed=0).latent
    return latent


class Tally:
    """FLOPs per prompt of the denoiser's calls, from those of calls that ran the same modules."""

    def __init__(self, known: dict[Ran, float]) -> None:
        self.prompts = 1
        self.ran: list[tuple[int, float]] = []  # in the present call
        self.calls: list[Ran] = []  # of the present run
        self.flops = known
        self._counts = False

    def begin(self, prompts: int) -> None:
        self.calls, self.prompts = [], prompts

    def known(self) -> bool:
        return all(call in self.flops for call in self.calls)

    def total(self) -> float:
        return sum(self.flops[call] for call in self.calls)

    @contextmanager
    def counting(self) -> Iterator[None]:
        self._counts = True
        try:
            yield
        finally:
            self._counts = False

    def call(self, loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.ran = []
        counter = flop_counter() if self._counts else None
        with counter or nullcontext():
            output = inner(*args, **kwargs)
        self.calls.append(tuple(self.ran))
        if counter:
            self.flops[self.calls[-1]] = counter.get_total_flops() / self.prompts
        return output


@contextmanager
def _tally(root: nn.Module, known: dict[Ran, float]) -> Iterator[Tally]:
    """A tally whose hooks are on the innermost modules: those of skipped blocks do not run."""
    tally = Tally(known)

    def noting(index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, args, output: tally.ran.append((index, len(args[0]) / tally.prompts))

    leaves = [m for m in root.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [leaf.register_forward_hook(noting(i)) for i, leaf in enumerate(leaves)]
    try:
        yield tally
    finally:
        for hook in hooks:
            hook.remove()


def _peak(run: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator holds during `run`, beyond those at its start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
