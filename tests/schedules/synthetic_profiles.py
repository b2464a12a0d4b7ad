"""Profiles of made-up diffusion models whose features are known numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacheplan.profilers.settings import AXES
from cacheplan.types import (
    Block,
    DiffusionSpec,
    FeatureProfile,
    FeatureSite,
    Part,
    Statistic,
)

Floats = NDArray[np.float64]
Trajectory = Callable[[FeatureSite], Floats]  # [T, M, C]
KINDS = ("attention", "mlp")


def spec(steps: int, blocks: int, starts: Sequence[int] = ()) -> DiffusionSpec:
    """`blocks` per denoiser, of cost 100 each; 20 more for a denoiser's ends."""
    names = ["", *(f"transformer_{i + 2}." for i in range(len(starts)))]
    parts = tuple(Part(name=kind, path=kind, cost=45, size=8) for kind in KINDS)
    return DiffusionSpec(
        id="made up",
        pipeline="P",
        architecture="D",
        blocks=tuple(
            Block(path=f"{name}blocks.{b}", cost=100, size=8, parts=parts)
            for name in names
            for b in range(blocks)
        ),
        branches=("all",),
        steps=steps,
        sigmas=tuple(np.linspace(1, 0, steps + 1) ** 1.5),
        scheduler="{}",
        call="{}",
        expert_starts=tuple(starts),
        cost=100 * blocks + 20,
        latent=(4, 8, 8),
        digest="sha256:0",
    )


def sites(steps: int, blocks: int, starts: Sequence[int] = ()) -> tuple[FeatureSite, ...]:
    end = blocks * (1 + len(starts))
    found = [FeatureSite(part=kind, first=b, last=b + 1) for b in range(end) for kind in KINDS]
    pairs = {(b, b + 1) for b in range(end)}
    for begin in range(0, end, blocks):
        pairs |= {(b, begin + blocks) for b in range(begin, begin + blocks)}
        pairs.add((begin, begin + blocks // 2))
        pairs |= {(begin, begin + n) for n in range(1, blocks // 4 + 1)}  # what gates look at
    found += [FeatureSite(part="delta", first=a, last=b) for a, b in sorted(pairs)]
    return (*found, *(FeatureSite(part=part, first=0, last=end) for part in ("hidden", "model")))


def smooth(steps: int, seed: int = 0, noise: float = 0.01) -> Trajectory:
    """Curves through the steps, another one for each site and number."""

    def trajectory(site: FeatureSite) -> Floats:
        own = [seed, site.first, site.last, sum(map(ord, site.part))]
        rng = np.random.default_rng(own)
        t = np.linspace(0, 1, steps)[:, None, None]
        a, b, c, d = rng.normal(size=(4, 1, 6, 3))
        wave: Floats = a + b * t + c * np.sin(2 * t + 3 * d)
        return wave + noise * rng.normal(size=wave.shape)

    return trajectory


def moments(features: Floats, lags: int) -> tuple[Floats, Floats]:
    """`gram` and `l1`, `[T, lags + 1]` each, not yet relative."""
    T = len(features)
    gram, l1 = np.zeros((2, T, lags + 1))
    for t in range(T):
        for lag in range(min(lags, t) + 1):
            gram[t, lag] = (features[t] * features[t - lag]).mean()
            l1[t, lag] = np.abs(features[t] - (features[t - lag] if lag else 0)).mean()
    return gram, l1


def lines(features: Floats, lags: int) -> Floats:
    """`forecast_l1` of the first block's output, `[T, lags + 1, lags + 1]`."""
    found = np.zeros((len(features), lags + 1, lags + 1))
    for t, now in enumerate(features):
        found[t, 0, 0] = np.abs(now).mean()
        for j in range(max(0, t - lags), t):
            found[t, t - j, 0] = np.abs(features[j] - now).mean()
            for i in range(max(0, t - lags), j):
                slope = (features[j] - features[i]) / (j - i)
                found[t, t - j, t - i] = np.abs(features[j] + slope * (t - j) - now).mean()
    return found


def build(
    steps: int = 20,
    blocks: int = 4,
    *,
    starts: Sequence[int] = (),
    lags: int | None = None,
    trajectory: Trajectory | None = None,
    final: Floats | None = None,
    latents: Floats | None = None,
    outputs: Floats | None = None,
    first: Floats | None = None,
    modulated: Floats | None = None,
    only: Callable[[FeatureSite], bool] = lambda site: True,
    **statistics: Any,
) -> FeatureProfile:
    """A profile as `collect_features` makes it, of the sites that `only` lets pass."""
    trajectory = trajectory or smooth(steps)
    lags = steps - 1 if lags is None else lags
    own = tuple(site for site in sites(steps, blocks, starts) if only(site))
    features = {site: trajectory(site) for site in own}
    limits = [0, *starts, steps]
    for index in range(len(starts) + 1):  # what another denoiser runs
        for site, values in features.items():
            if site.part not in ("hidden", "model") and site.first // blocks != index:
                values[limits[index] : limits[index + 1]] = 0
    whole = next(site for site in own if site.part == "hidden")
    power = (features[whole] ** 2).mean()
    tables = {site: moments(values, lags) for site, values in features.items()}
    gram = np.stack([g / g[:, 0].mean() for g, _ in tables.values()])
    held = np.zeros(steps)
    own_gram = gram[own.index(whole)]
    held[1:] = own_gram[1:, 0] + own_gram[:-1, 0] - 2 * own_gram[1:, 1]
    channels = np.moveaxis(features[whole], 2, 0)  # [C, T, M]
    latents = np.cumsum(features[own[-1]], 0) if latents is None else latents
    outputs = features[own[-1]] if outputs is None else outputs
    found = {
        "gram": gram,
        "l1": np.stack([x / x[:, 0].mean() for _, x in tables.values()]),
        "power": np.array([(features[site] ** 2).mean() / power for site in own]),
        "scale": np.array(power**0.5),
        "channel_gram": np.stack([moments(c[..., None], lags)[0] for c in channels]) / power,
        "channel_mean": channels.mean(2) / power**0.5,
        "token_ratio": np.linspace(1, 0.98, steps),
        "latent_l1": moments(latents, lags)[1],
        "output_l1": moments(outputs, lags)[1],
        "forecast_l1": lines(features[own[-1]] if first is None else first, lags),
        "modulated_l1": moments(latents if modulated is None else modulated, lags)[1],
        "final_error": (held * np.linspace(2, 0.5, steps) if final is None else final)[None],
        "final_damage": held[None],
        "output_damage": held[None],
        "activation_range": _ranges(steps),
        "reader_moments": np.random.default_rng(0).uniform(0.1, 0.2, (3, steps, 4)),
        **statistics,
    }
    return FeatureProfile(
        model=spec(steps, blocks, starts),
        statistics={
            name: Statistic(AXES[name], 1, np.asarray(mean), np.zeros_like(mean))
            for name, mean in found.items()
        },
        sites=own,
        lags=lags,
        probes=(whole,),
        prompts=1,
        prompts_digest="sha256:0",
        seed=0,
        linears=("blocks.0.mlp", "blocks.0.idle", "proj_out"),
        readers=(("proj_out", 3),),
    )


def _ranges(steps: int) -> Floats:
    """`activation_range`; the second layer never runs."""
    wide = np.linspace(1, 2, steps)[:, None] * np.array([-0.01, 0.02])
    return np.stack([wide, 0 * wide, 2 * wide])
