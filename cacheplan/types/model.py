"""What was profiled: enough of a model's shape to know whether a plan belongs to it."""

from __future__ import annotations

from dataclasses import dataclass

FULL_ATTENTION = "full_attention"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Identity and cache geometry of one model.

    `digest` covers the configuration and a sample of every weight, so a fine-tuned model does
    not pass for its base.  Widths are taken from the key and value tensors' own last dimension:
    multi-head latent attention stores unequal ones.  `steps` and `scheduler` are None outside
    diffusion.
    """

    id: str
    architecture: str
    family: str  # "language" or "diffusion"
    layer_kinds: tuple[str, ...]  # one per layer, in transformers' words: "full_attention", ...
    query_heads: int
    kv_heads: int
    key_width: int
    value_width: int
    max_length: int
    rope: str  # canonical JSON of the rotary-embedding parameters
    digest: str
    steps: int | None = None
    scheduler: str | None = None

    @property
    def layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def token_width(self) -> int:
        """Numbers stored per token and kv head: one key and one value."""
        return self.key_width + self.value_width


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place where a decision is made; `head` or `step` None means all of them alike."""

    layer: int
    target: str = "kv"  # "kv", "feature" or "weight"
    head: int | None = None
    step: int | None = None
