"""What was profiled: enough of a model to know whether a plan belongs to it, and its sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

FULL_ATTENTION = "full_attention"


@dataclass(frozen=True, kw_only=True)
class LanguageSpec:
    """Identity and cache geometry of a language model.

    `digest` covers the configuration and a sample of every weight, so a fine-tuned model does
    not pass for its base.  Heads and widths are those of the planned layers' key and value tensors,
    not of the configuration.

    Plans are for layers that see the whole text ("full_attention"); layers of any other kind
    (sliding windows, recurrent states, layers that read another's cache) keep the library's own
    cache, which does not grow with the text.  `image_token` is the id of the token that stands for
    a part of an image, in models that see.
    """

    family: ClassVar[str] = "language"
    id: str
    architecture: str
    layer_kinds: tuple[str, ...]  # one per layer, in transformers' words: "full_attention", ...
    query_heads: int
    kv_heads: int
    key_width: int
    value_width: int
    max_length: int
    rope: str  # canonical JSON of the rotary-embedding parameters
    digest: str
    image_token: int | None = None

    @property
    def layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def planned(self) -> tuple[int, ...]:
        """The layers that plans are for, ascending: the axis "layer" of a profile's statistics."""
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == FULL_ATTENTION)

    @property
    def rows(self) -> int:
        """Pairs of planned layer and kv head."""
        return len(self.planned) * self.kv_heads

    @property
    def token_width(self) -> int:
        """Numbers stored per token and kv head: one key and one value."""
        return self.key_width + self.value_width


@dataclass(frozen=True, kw_only=True)
class TextProjections:
    """What a cross-attention makes of the text alone: its keys and values.

    `cost` and `size` are counted as in `Block`, of all of them together; `given` is how many
    numbers the first of them is given.
    """

    paths: tuple[str, ...]  # of linear layers, relative to the part
    cost: int
    size: int
    given: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """One module of a block whose output can be cached, before its adaptive gate.

    `name` is unique within the block: "attention", "cross_attention", "mlp", or "mlp_context"
    for a second stream.  `cost` and `size` are counted as in `Block`.
    """

    name: str
    path: str  # relative to the block
    cost: int
    size: int
    text: TextProjections | None = None  # of a cross-attention; `cost` includes theirs


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a denoiser.

    `cost` is the FLOPs of all its calls within one step, for one prompt.  `size` is how many
    numbers one cached delta of it holds: all streams and all branches, for one prompt.
    """

    path: str  # "transformer_blocks.0", or "transformer_2.blocks.3" in a second denoiser
    cost: int
    size: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class DiffusionSpec:
    """Identity, schedule and cost of a diffusion pipeline as it is called.

    A schedule holds for one number of steps, one scheduler and one set of call settings, so
    they are part of what a plan belongs to.  `digest` covers the configuration of every
    denoiser and a sample of its weights.
    """

    family: ClassVar[str] = "diffusion"
    id: str  # path or hub id of the pipeline
    pipeline: str  # class name, "PixArtAlphaPipeline"
    architecture: str  # class name of the denoiser, "PixArtTransformer2DModel"
    blocks: tuple[Block, ...]  # in order of execution
    branches: tuple[str, ...]  # the denoiser's calls within a step: ("all",), ("cond", "uncond")
    steps: int  # number of scheduler.step calls
    sigmas: tuple[float, ...]  # steps + 1 noise levels, or timesteps where there are none
    scheduler: str  # canonical JSON of class and configuration
    call: str  # canonical JSON of the call's settings, without prompt and seed
    expert_starts: tuple[int, ...] = ()  # steps at which another denoiser takes over
    cost: int  # FLOPs of one whole step, all branches, one prompt
    latent: tuple[int, ...]  # shape of one prompt's latent
    copies: int = 1  # latents that one call holds per prompt: 2 where guidance is batched
    digest: str


ModelSpec = LanguageSpec | DiffusionSpec


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place of a language model; `head` None means all of the layer's kv heads alike."""

    layer: int
    target: str = "kv"  # or "weight"
    head: int | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureSite:
    """A feature that can be kept from one step to the next, over blocks `first` to `last` - 1.

    `part` names what is kept:
    a part's own name: its output in block `first`, before the gate (`last` = `first` + 1);
    "delta": output minus input of the blocks, in every stream;
    "hidden": output of the last block, to which the fresh final norm and projection are applied
    (all blocks);
    "model": the denoiser's output minus its latent input, so that a step costs nothing (all
    blocks);
    "branch": the tensor entering the last up block of a UNet.
    """

    part: str
    first: int
    last: int
