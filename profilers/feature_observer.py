"""Watch every site of a diffusion model during one full run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cacheplan.adapters.calls import latent, sample, tensors
from cacheplan.adapters.denoiser import Observation
from cacheplan.adapters.taps import Handler
from cacheplan.plans.compute import expert_ranges
from cacheplan.types import FeatureSite

# the site's tensors at this step and branch -> what to put in their place, None to leave them
Take = Callable[[FeatureSite, list[Tensor]], list[Tensor] | None]
# what gates look at in the first block: "output", or "modulated" for the input of its attention
Look = Callable[[str, Tensor], None]


ENDS = ("delta", "hidden", "branch")  # sites that the output of their last block completes


class SiteTaps:
    """Handlers that compute everything, show each site's tensors to `take` and obey its answer.

    Delta sites are shown as output minus input of every stream.  `look` is shown what gates see.
    """

    def __init__(
        self,
        seen: Observation,
        sites: Sequence[FeatureSite],
        take: Take,
        look: Look | None = None,
    ) -> None:
        self.seen, self.take, self.look = seen, take, look
        self.sites = sites
        ranges = expert_ranges(seen.spec)
        self._firsts = {blocks.start for blocks in ranges}  # the first block of each denoiser
        self._lasts = {blocks.stop for blocks in ranges}  # one past the last
        self._entries: dict[int, tuple[Tensor, ...]] = {}

    def handlers(self, paths: Mapping[str, str]) -> dict[str, Handler]:
        """Taps for the blocks in `paths`: from the spec's path to that within its denoiser."""
        return around_sites(self.seen, self.sites, paths, self._block, self._part)

    def _part(
        self, site: FeatureSite, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.look and site.part == "attention" and site.first in self._firsts:
            self.look("modulated", latent(inner, args, kwargs))
        output = inner(*args, **kwargs)
        self.take(site, list(tensors(output)))
        return output

    def _block(self, index: int, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        streams = self.seen.streams.get(self.seen.spec.blocks[index].path)
        if streams is not None:
            self._entries[index] = streams.take(args, kwargs)
        output = inner(*args, **kwargs)
        if self.look and streams is not None and index in self._firsts:
            self.look("output", streams.results(output)[0])  # type: ignore[arg-type]
        for site in self.sites:
            if site.part not in ENDS or not self._completes(index, site):
                continue
            if streams is None:  # a UNet: what the last block that is left out hands on
                output = _first(output, self.take(site, [tensors(output)[0]]))
            elif site.part == "hidden":
                results = streams.results(output)
                found = self.take(site, [results[0]])  # type: ignore[list-item]
                if found is not None:
                    output = streams.rebuild([*found, *results[1:]])
            else:
                pairs = zip(streams.results(output), self._entries[site.first], strict=True)
                self.take(site, [r - entry for r, entry in pairs if r is not None])
        return output

    def _completes(self, index: int, site: FeatureSite) -> bool:
        if site.part == "hidden":  # whichever denoiser runs
            return index + 1 in self._lasts
        return index + 1 == site.last


def around_sites(
    seen: Observation,
    sites: Sequence[FeatureSite],
    paths: Mapping[str, str],
    around_block: Callable[..., Any],
    around_part: Callable[..., Any],
) -> dict[str, Handler]:
    """Taps for the blocks in `paths` and for those of their parts that are among `sites`.

    The functions get the index of the block, or the site, before what a tap's handler gets.
    """
    found: dict[str, Handler] = {}
    for index, block in enumerate(seen.spec.blocks):
        if block.path not in paths:
            continue
        found[paths[block.path]] = partial(around_block, index)
        for part in block.parts:
            site = FeatureSite(part=part.name, first=index, last=index + 1)
            if site in sites:
                found[f"{paths[block.path]}.{part.path}"] = partial(around_part, site)
    return found


def _first(output: Any, found: list[Tensor] | None) -> Any:
    if found is None:
        return output
    return found[0] if isinstance(output, Tensor) else (found[0], *output[1:])


def model_delta(module: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The denoiser's output minus its latent input.

    Nothing is taken of learned variances, nor of a picture that is given along with the latent.
    """
    given, made = latent(module, args, kwargs), sample(output)
    channel = 1 if made.ndim > 3 else made.ndim - 1
    channels = min(given.shape[channel], made.shape[channel])
    return made.narrow(channel, 0, channels) - given.narrow(channel, 0, channels)


def rows(parts: Sequence[Tensor], tokens: int) -> Tensor:
    """`[M, C]`: at most about `tokens` tokens of the batch, the same ones at every step.

    Streams of another width than the first are left out: they have no channels in common.
    """
    flat = []
    for part in parts:
        if part.ndim > 3:  # pictures and videos: [B, C, ...]
            part = part.movedim(1, -1)
        if part.shape[-1] == parts[0].shape[1 if parts[0].ndim > 3 else -1]:
            flat.append(part.reshape(-1, part.shape[-1]))
    joined = torch.cat(flat)
    if len(joined) <= tokens:
        return joined
    chosen = torch.randperm(len(joined), generator=torch.Generator().manual_seed(0))[:tokens]
    return joined[chosen.sort().values.to(joined.device)]
