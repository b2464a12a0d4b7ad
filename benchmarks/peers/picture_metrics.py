"""How far pictures are from others: SSIM, and a distance of distributions by random features.

The distance needs no trained network: three 3 x 3 convolutions of stride 2 with 32, 64 and 128
channels, He-normal weights from seed 0, leaky ReLUs (0.2), and of each layer the mean and the
standard deviation over space, 448 features.  They are standardized by the drawings that the
pictures are compared with, and compared by KID's estimator: the unbiased squared maximum mean
discrepancy with the kernel (x.y / 448 + 1)^3 (Binkowski et al. 2018, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from cacheplan.zoo.shapes import drawing

CHANNELS = (3, 32, 64, 128)
DRAWINGS = 16  # for every prompt
_WINDOW, _SIGMA = 11, 1.5  # of SSIM, pixels
_C1, _C2 = 0.01**2, 0.03**2


def ssim(pictures: Tensor, others: Tensor) -> Tensor:
    """Structural similarity `[n]` of pictures `[n, 3, H, W]` from 0 to 1 (Wang et al. 2004)."""
    place = torch.arange(_WINDOW) - _WINDOW // 2
    line = torch.exp(-place.square() / (2 * _SIGMA**2))
    line = line / line.sum()
    channels = pictures.shape[1]
    window = (line[:, None] * line).expand(channels, 1, _WINDOW, _WINDOW)

    def local(values: Tensor) -> Tensor:
        return functional.conv2d(values, window, groups=channels)

    a, b = local(pictures), local(others)
    var_a, var_b = local(pictures.square()) - a.square(), local(others.square()) - b.square()
    covariance = local(pictures * others) - a * b
    luminance = (2 * a * b + _C1) / (a.square() + b.square() + _C1)
    structure = (2 * covariance + _C2) / (var_a + var_b + _C2)
    return (luminance * structure).flatten(1).mean(1)


class Distance:
    """Distance of pictures from drawings of the same prompts; about 0 for drawings themselves."""

    def __init__(self, prompts: Sequence[str]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layers = [
            torch.randn(new, old, 3, 3, generator=generator) * (2 / (9 * old)) ** 0.5
            for old, new in pairwise(CHANNELS)
        ]
        found = self._features(_drawn(prompts, generator))
        self.mean, self.spread = found.mean(0), found.std(0)
        self.drawn = self._standard(found)

    def __call__(self, pictures: Tensor) -> float:
        """Squared distance of pictures `[n, 3, H, W]` from 0 to 1."""
        made, drawn = self._standard(self._features(pictures)), self.drawn
        return float(_among(made) + _among(drawn) - 2 * _kernel(made, drawn).mean())

    def _features(self, pictures: Tensor) -> Tensor:
        values, found = pictures * 2 - 1, []
        for weight in self.layers:
            values = functional.leaky_relu(
                functional.conv2d(values, weight, stride=2, padding=1), 0.2
            )
            found += [values.mean((2, 3)), values.std((2, 3))]
        return torch.cat(found, dim=1)

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.spread


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.double(), y.double()
    return (x @ y.T / x.shape[1] + 1) ** 3


def _among(x: Tensor) -> Tensor:
    """Mean of the kernel over pairs of different pictures."""
    kernel, n = _kernel(x, x), len(x)
    return (kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1))


def _drawn(prompts: Sequence[str], generator: torch.Generator) -> Tensor:
    """`DRAWINGS` pictures of every prompt, from 0 to 1."""
    words = (
        drawing.COUNTS,
        drawing.TEXTURES,
        drawing.COLOURS,
        drawing.BACKGROUNDS,
        drawing.SHAPES,
    )
    every = drawing.Scene(*torch.cartesian_prod(*(torch.arange(len(w)) for w in words)).T)
    place = {prompt: index for index, prompt in enumerate(every.prompts())}
    chosen = torch.tensor([place[prompt] for prompt in prompts]).repeat_interleave(DRAWINGS)
    scene = drawing.Scene(
        every.count[chosen],
        every.texture[chosen],
        every.colour[chosen],
        every.background[chosen],
        every.shape[chosen],
    )
    return drawing.draw(scene, generator) / 2 + 0.5
