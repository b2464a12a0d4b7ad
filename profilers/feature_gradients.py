"""How far every fine feature moves the model's output when it is held, all of them in one pass.

Holding a feature F at step t changes the output by about J dF, with dF = F_t - F_{t-1} and J the
derivative of the output by F.  For random signs r, E (r . J dF)^2 = |J dF|^2 (Hutchinson 1990),
and r . J is a gradient: one backward pass gives it for all sites at once, where ablation takes a
run for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacheplan.adapters.calls import sample, tensors, unwrapped, with_sample
from cacheplan.adapters.denoiser import Observation, locate
from cacheplan.adapters.loop import Loop, denoisers, watching
from cacheplan.adapters.sampling import run_pipeline
from cacheplan.adapters.taps import Handler, tapped
from cacheplan.errors import UnsupportedError
from cacheplan.plans.compute import expert_ranges
from cacheplan.profilers.feature_observer import around_sites, model_delta
from cacheplan.profilers.feature_prompts import PicturePrompt
from cacheplan.types import FeatureSite

DRAWS = 8  # of signs per call: a prompt's estimate is right to about half, as many are averaged


class GradientTaps:
    """Handlers that compute everything and note each site's value and where it enters the model."""

    def __init__(self, seen: Observation, sites: Sequence[FeatureSite]) -> None:
        self.seen = seen
        self.sites = [site for site in sites if site.part != "model"]
        self._lasts = {blocks.stop for blocks in expert_ranges(seen.spec)}
        self._entries: dict[int, list[Tensor]] = {}
        self.points: dict[FeatureSite, list[Tensor]] = {}  # in the graph of the present call
        self.values: dict[FeatureSite, list[Tensor]] = {}

    def forget(self) -> None:
        self._entries, self.points, self.values = {}, {}, {}

    def handlers(self, paths: Mapping[str, str]) -> dict[str, Handler]:
        """Taps for the blocks in `paths`: from the spec's path to that within its denoiser."""
        return around_sites(self.seen, self.sites, paths, self._block, self._part)

    def _part(
        self, site: FeatureSite, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        output = inner(*args, **kwargs)
        self._note(site, list(tensors(output)), list(tensors(output)))
        return output

    def _block(self, index: int, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        streams = self.seen.streams[self.seen.spec.blocks[index].path]
        self._entries[index] = [entry.detach() for entry in streams.take(args, kwargs)]
        output = inner(*args, **kwargs)
        results = streams.results(output)
        found = [result for result in results if result is not None]
        for site in self.sites:
            if site.part == "hidden" and index + 1 in self._lasts:
                self._note(site, found[:1], found[:1])
            elif site.part == "delta" and index + 1 == site.last:
                pairs = zip(results, self._entries[site.first], strict=True)
                deltas = [result.detach() - entry for result, entry in pairs if result is not None]
                self._note(site, found, deltas)
        return output

    def _note(self, site: FeatureSite, points: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        for point in points:
            if not point.requires_grad:  # of a model whose weights are frozen
                point.requires_grad_()
        self.points[site] = list(points)
        self.values[site] = [value.detach() for value in values]


def check_gradients(seen: Observation) -> None:
    """UnsupportedError for UNets: what enters their blocks is not known here."""
    if not seen.streams:
        raise UnsupportedError(
            f"{seen.spec.architecture} has no transformer blocks whose gradients are known here: "
            "profile without --gradients."
        )


@contextmanager
def _following() -> Iterator[None]:
    """What torch says where it can take no gradient, or has no memory for it, as one sentence."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise UnsupportedError(
            f"No gradient can be taken of this denoiser ({reason}): profile without --gradients."
        ) from error


def gradient_changes(
    pipe: Any,
    seen: Observation,
    call: Mapping[str, Any],
    prompt: PicturePrompt,
    sites: Sequence[FeatureSite],
    *,
    draws: int = DRAWS,
) -> NDArray[np.float64]:
    """`[sites, T]`: mean square change of the model's output when one site is held, to first order.

    Zero for the whole model, at step 0, and where another denoiser takes over.  Takes as many
    backward passes per call of the denoiser as `draws`, and the memory of training without an
    optimizer.  Raises UnsupportedError for UNets and where no gradient can be taken.
    """
    spec = seen.spec
    check_gradients(seen)
    taps = GradientTaps(seen, sites)
    found = np.zeros((len(sites), spec.steps))
    before: dict[str, dict[FeatureSite, list[Tensor]]] = {}  # by branch
    signs = torch.Generator().manual_seed(prompt.seed)

    def on_call(loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        taps.forget()
        with _following(), torch.enable_grad():
            output = inner(*args, **kwargs)
            delta = model_delta(loop.module, output, args, kwargs)
        old = before.get(loop.branch, {})
        held = [s for s in taps.sites if s in old and s in taps.values]
        if held and loop.step not in spec.expert_starts:
            moves = {s: [n - o for n, o in zip(taps.values[s], old[s], strict=True)] for s in held}
            effects = squares(delta, {s: taps.points[s] for s in held}, moves, draws, signs)
            for site, square in effects.items():
                mean = square / delta.numel() / len(spec.branches)
                found[sites.index(site), loop.step] += mean
        before[loop.branch] = dict(taps.values)
        taps.forget()
        return with_sample(output, sample(output).detach())

    with ExitStack() as stack:
        stack.enter_context(watching(pipe, on_call=on_call))
        for name, module in denoisers(pipe).items():
            root = unwrapped(module)
            paths = {locate(pipe, name, path): path for path, _ in root.named_modules()}
            stack.enter_context(tapped(root, taps.handlers(paths)))
        run_pipeline(pipe, {**call, **prompt.call}, seed=prompt.seed)
    return found


def squares(
    output: Tensor,
    points: Mapping[FeatureSite, Sequence[Tensor]],
    moves: Mapping[FeatureSite, Sequence[Tensor]],
    draws: int,
    signs: torch.Generator,
) -> dict[FeatureSite, float]:
    """`|J dF|^2` of every site, the mean over `draws` of `(r . J dF)^2`."""
    flat = [point for group in points.values() for point in group]
    found = dict.fromkeys(points, 0.0)
    for draw in range(draws):
        r = torch.randint(2, output.shape, generator=signs).to(output) * 2 - 1
        with _following():
            gradients = torch.autograd.grad(
                output, flat, r, retain_graph=draw + 1 < draws, allow_unused=True
            )
        left = iter(gradients)
        for site, group in moves.items():
            product = sum(
                float((gradient.double() * move.double()).sum())
                for gradient, move in zip([next(left) for _ in group], group, strict=True)
                if gradient is not None
            )
            found[site] += product**2 / draws
    return found
