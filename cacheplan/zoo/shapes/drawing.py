"""Pictures of one or two coloured shapes, and the prompts that describe them.

"two striped red stars on white": count, texture, colour, shape and background are drawn at
random, and so are sizes, places and turns.  Everything is a signed distance field, so a whole
batch is drawn by a few tensor operations, with smooth edges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 64  # pixels
COUNTS = ("one", "two")
TEXTURES = ("plain", "striped")
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "orange": (1.00, 0.55, 0.10),
    "yellow": (0.95, 0.85, 0.15),
    "green": (0.15, 0.70, 0.25),
    "blue": (0.15, 0.35, 0.90),
    "purple": (0.60, 0.20, 0.75),
}
BACKGROUNDS = {"black": (0.06, 0.06, 0.08), "grey": (0.5, 0.5, 0.5), "white": (0.96, 0.96, 0.94)}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
WORDS = (
    *COUNTS,
    *TEXTURES[1:],
    *COLOURS,
    *BACKGROUNDS,
    *SHAPES,
    *(f"{shape}{'es' if shape == 'cross' else 's'}" for shape in SHAPES),
    "on",
)
_RADIUS = (19.0, 13.0)  # for one and for two shapes
_CLOSEST = 31.0  # pixels between the centres of two shapes


@dataclass(frozen=True, eq=False)
class Scene:
    """What `n` pictures show: indices `[n]` into the word lists above."""

    count: Tensor
    texture: Tensor
    colour: Tensor
    background: Tensor
    shape: Tensor

    def prompts(self) -> list[str]:
        rows = zip(
            self.count.tolist(),
            self.texture.tolist(),
            self.colour.tolist(),
            self.shape.tolist(),
            self.background.tolist(),
            strict=True,
        )
        return [_prompt(*row) for row in rows]


def _prompt(count: int, texture: int, colour: int, shape: int, background: int) -> str:
    noun = SHAPES[shape]
    if count:
        noun += "es" if noun == "cross" else "s"
    words = [COUNTS[count], TEXTURES[texture] if texture else "", list(COLOURS)[colour], noun]
    words += ["on", list(BACKGROUNDS)[background]]
    return " ".join(word for word in words if word)


def random_scene(n: int, generator: torch.Generator) -> Scene:
    def pick(words: object) -> Tensor:
        return torch.randint(len(words), (n,), generator=generator)  # type: ignore[arg-type]

    return Scene(pick(COUNTS), pick(TEXTURES), pick(COLOURS), pick(BACKGROUNDS), pick(SHAPES))


def draw(scene: Scene, generator: torch.Generator) -> Tensor:
    """The pictures of a scene, `[n, 3, SIZE, SIZE]` from -1 to 1."""
    n = len(scene.count)
    grid = torch.arange(SIZE) + 0.5
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    centres = _places(scene.count, generator)  # [n, 2, 2]
    turn = (torch.rand(n, 2, 1, 1, generator=generator) - 0.5) * 0.4
    scale = 0.9 + 0.2 * torch.rand(n, 2, 1, 1, generator=generator)
    radius = torch.tensor(_RADIUS)[scene.count].view(n, 1, 1, 1) * scale
    u, v = x - centres[..., 0, None, None], y - centres[..., 1, None, None]  # [n, 2, S, S]
    a, b = u * turn.cos() + v * turn.sin(), v * turn.cos() - u * turn.sin()
    distance = _distance(a, b, radius, scene.shape)
    absent = torch.arange(2).view(1, 2) > scene.count.view(n, 1)
    distance = distance.masked_fill(absent.view(n, 2, 1, 1), math.inf)
    nearest = distance.argmin(1, keepdim=True)
    a, b = a.gather(1, nearest)[:, 0], b.gather(1, nearest)[:, 0]
    mask = (0.5 - distance.gather(1, nearest)[:, 0]).clamp(0, 1)[:, None]
    ink = torch.tensor(list(COLOURS.values()))[scene.colour].view(n, 3, 1, 1)
    paper = torch.tensor(list(BACKGROUNDS.values()))[scene.background].view(n, 3, 1, 1)
    pattern = _pattern(a, b, scene.texture)[:, None]
    picture = paper * (1 - mask) + mask * (ink * (1 - pattern) + pattern * (1 - 0.55 * (1 - ink)))
    return picture * 2 - 1


def _places(count: Tensor, generator: torch.Generator) -> Tensor:
    """Centres `[n, 2, 2]` in pixels, at least `_CLOSEST` apart: the best of several draws."""
    n, tries = len(count), 24
    margin = torch.tensor(_RADIUS)[count].view(n, 1, 1, 1) + 3
    at = margin + (SIZE - 2 * margin) * torch.rand(n, tries, 2, 2, generator=generator)
    apart = torch.cdist(at, at) + 1e3 * torch.eye(2)
    absent = torch.arange(2).view(1, 2) > count.view(n, 1)
    apart = apart.masked_fill(absent.view(n, 1, 1, 2), 1e3).masked_fill(
        absent.view(n, 1, 2, 1), 1e3
    )
    nearest = apart.flatten(2).min(-1).values.clamp(max=_CLOSEST)
    best = nearest.argmax(1)  # the first that is far enough
    return at[torch.arange(n), best]


def _distance(a: Tensor, b: Tensor, r: Tensor, shape: Tensor) -> Tensor:
    """Signed distance in pixels to each of two shapes, `[n, 2, SIZE, SIZE]`."""
    length = (a * a + b * b).sqrt()
    angle = torch.atan2(a, -b)
    point = (angle * 5 / (2 * math.pi)).frac().abs()
    spoke = (point - (point > 0.5).float()).abs() * 2  # 0 at the five tips, 1 between them
    fields = (
        length - r,
        torch.maximum(a.abs(), b.abs()) - 0.85 * r,
        torch.maximum(b - 0.6 * r, 0.866 * a.abs() - 0.5 * b - 0.6 * r),
        length - r * (1.1 - 0.62 * spoke),
        (length - 0.75 * r).abs() - 0.27 * r,
        torch.minimum(
            torch.maximum(a.abs() - r, b.abs() - 0.34 * r),
            torch.maximum(b.abs() - r, a.abs() - 0.34 * r),
        ),
    )
    chosen = torch.zeros_like(length)
    for index, field in enumerate(fields):
        chosen = torch.where((shape == index).view(-1, 1, 1, 1), field, chosen)
    return chosen


def _pattern(a: Tensor, b: Tensor, texture: Tensor) -> Tensor:
    """Share of the lighter tint, `[n, SIZE, SIZE]`."""
    stripes = ((a + 0.3 * b) * (2 * math.pi / 9)).sin().mul(2).clamp(0, 1)
    return torch.where((texture == 1).view(-1, 1, 1), stripes, torch.zeros_like(stripes))
