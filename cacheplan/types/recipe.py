"""A published method as a row of orthogonal cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cacheplan.types.features import Gate
from cacheplan.types.plan import KVAction, Tier
from cacheplan.types.weights import LayerWeight, Online


@dataclass(frozen=True, kw_only=True)
class KVRecipe:
    """Name, paper, and the cells it is made of.

    `allocation` decides how much each site keeps: "uniform", "prefix" (one threshold on
    retained attention mass, per layer), "proportional" (layers by `weight`), "classes" (some heads
    keep everything, the others share the rest), "knapsack" (measured damage, per head), "joint"
    (the same, of tokens and precisions at once), "layers" (a precision per layer, all tokens stay)
    or "fixed" (nothing: the candidate is done as it is).
    `candidates` are what may be done at a site, as actions whose `keep` is still open (1.0);
    published methods have exactly one, and the knapsack chooses per site.

    In a proportional division every layer first gets its protected tokens or `least` tokens, or
    `least_share` of the mean, whichever is most; none gets more than `most` times the mean.
    `ranking_heads` is the number of query heads per layer that rank tokens for all (0: each
    ranks its own), chosen by the profile's retrieval scores.

    `formats` are the precisions to choose from, `demotions` pairs of them for tokens that stay and
    for the others.

    `decode_every`, `prefill_chunk` and `online` are the plan's (`Trigger`).
    """

    family: ClassVar[str] = "language"
    name: str
    summary: str
    paper: str
    allocation: str
    candidates: tuple[KVAction, ...]
    weight: LayerWeight | None = None
    least: int = 0
    least_share: float = 0.0
    most: float = float("inf")
    ranking_heads: int = 0
    formats: tuple[Tier, ...] = ()
    demotions: tuple[tuple[Tier, Tier], ...] = ()
    decode_every: int | None = None
    prefill_chunk: int | None = None
    online: Online | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureRecipe:
    """Name, paper, and the cells it is made of.

    `sites` are what is cached: "parts" (attention, mlp ... of every block), "blocks" (each
    block's delta), "stack" and "tail" (the delta of all blocks, or of all but the first `head`),
    "halves" (the delta of the later half of the blocks in the first half of the run, of the first
    half in the second), "branch" (a UNet's branch), "whole" (that or the last hidden state) or
    "model" (the model's delta).  `share` says which of them follow one schedule: "all", "type"
    (parts of one name) or "site".

    `schedule` chooses the computed steps: "interval" (evenly spread), "path" (shortest path over
    `cost`), "recurrence" (DPCache's), "lookahead", "threshold", "magnitude", "mask" (fixed bins),
    "broadcast" (every so many steps, each kind of part its own number), "gate" (whenever the gate
    does not object) or "planned".  `cost` is what it minimises: "l1", "square" or "cosine"
    distance.  `segment` limits the length of a stretch, as multiples of the mean one.  The first
    `warmup` steps are computed, and the last if `protect_last`; also those outside of the
    `window`, in shares of the run.  `ranges` are, in proportion, the steps that one computation
    of a part serves in a "broadcast"; parts that it does not name are always computed.

    `basis` and `order` say how a step is forecast, `correction` ("none", "scalar", "channel")
    what is fitted after that, `donors` how many sites hand their steps on (BAC's union),
    `scale_steps` whether the sampler's steps are shortened (ERTACache), `text_once` whether keys
    and values of the text are computed once where they stay the same.  `bits` are those of the
    linear layers' weights and activations, simulated; without, they stay full.
    """

    family: ClassVar[str] = "diffusion"
    name: str
    summary: str
    paper: str
    sites: str
    schedule: str
    share: str = "all"
    basis: str = "hold"
    order: int = 0
    cost: str = "square"
    segment: tuple[float, float] | None = None
    warmup: int = 1
    protect_last: bool = False
    window: tuple[float, float] = (0.0, 1.0)
    ranges: tuple[tuple[str, int], ...] = ()
    head: int = 1
    correction: str = "none"
    donors: int = 0
    scale_steps: bool = False
    text_once: bool = False
    bits: tuple[int, int] | None = None
    gate: Gate | None = None


Recipe = KVRecipe | FeatureRecipe
