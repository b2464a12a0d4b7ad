"""Plans for KV caches, and what plans of all families share: budget, certificate, origin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cacheplan.types.model import LanguageSpec, Site
from cacheplan.types.scorers import Position, Scorer
from cacheplan.types.weights import Online


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How numbers of one tensor are stored.

    `format` "model" keeps the model's own type.  "int" (8, 4 or 2 bits, with scale and zero) and
    "float" (8 bits, e4m3, with a scale) share their scales along `axis`: "channel", one for each
    channel and `group` tokens (keys: KIVI, arXiv 2402.02750), or "token", one for each token and
    `group` channels (None: all).  `separable` first divides channels by the root of their largest
    value (ZipCache, arXiv 2405.14256).  At least the newest `residual` tokens stay in the model's
    type.  In linear layers (`WeightAction`) "channel" is one scale for each output channel of the
    weights, and "tensor" one for all that the layer is given.
    """

    format: str = "model"
    bits: int = 16
    axis: str = "token"
    group: int | None = None
    residual: int = 0
    separable: bool = False


@dataclass(frozen=True, kw_only=True)
class Tier:
    """How keys and values of some tokens are stored."""

    key: Precision
    value: Precision


@dataclass(frozen=True, kw_only=True)
class Merge:
    """How tokens that do not stay are folded into tokens that do, which keep their places.

    Tokens protected by `sinks` and `recent` take nothing in.  The others take, with `to`
    "nearest", every loser that is nearest to them in the order of the cache (of two, the older
    takes it), keys and values averaged alike (Elastic Cache, arXiv 2407.18121).  With "similar",
    a run is a stretch of neighbours whose keys have a cosine of at least `similarity`; its losers
    fold into the best scored token that stays of it, with weights exp(-|k - k_p|^2 / 2 sigma^2)
    by the distance from that token's key (KVMerger, arXiv 2407.08454).  Runs of which nothing
    stays are evicted.

    `sigma` says where its width comes from: "distance", the mean of |k - k_p|^2 over run and
    pivot is sigma^2; "weights", the sum of the weights so found, divided by sqrt(2) times
    their number, is then sigma, as the paper defines it from the weights themselves.

    `count_bias` stores log(number of tokens merged) with each token and adds it to the logit, so
    that n equal keys keep the softmax mass of n; it costs 4 bytes per token.
    """

    to: str = "nearest"  # or "similar"
    similarity: float = 0.75
    sigma: str = "distance"  # or "weights"
    count_bias: bool = True


@dataclass(frozen=True, kw_only=True)
class KVAction:
    """What happens to the KV cache of one site once the prompt has been read.

    `keep` is the fraction of tokens whose keys and values stay.  Always kept, as far as the
    number of tokens allows: the newest `recent` (or the share `recent_share` of the kept
    tokens, whichever is more), then the first `sinks`.  The rest is filled by `scorer`; with
    `protect_text` by text before any image token (LOOK-M's text prior, arXiv 2406.18139).

    `share` says who chooses together: "head" (each kv head its own tokens), "layer" (one set of
    tokens for all heads of the layer, by mean score).  `split` says how a layer's tokens are
    divided when the site covers all heads: "equal", or "adaptive" (AdaKV: the best scores of
    the whole layer win, after each head has taken `floor` of its equal part).

    `losers` are the tokens that do not stay.
    """

    keep: float
    scorer: Scorer = field(default_factory=Position)
    sinks: int = 0
    recent: int = 0
    recent_share: float = 0.0
    protect_text: bool = False
    share: str = "head"
    split: str = "equal"
    floor: float = 0.0
    losers: str = "evict"  # or "merge" or "demote"; "offload" is named, not yet run
    merge: Merge | None = None  # how, where losers are merged
    low: Tier | None = None  # in which numbers, where losers are demoted
    key: Precision = field(default_factory=Precision)
    value: Precision = field(default_factory=Precision)
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class WeightAction:
    """Precision of a linear layer's weights, and of what it is given (activations).

    Of language models part of the format, not yet run; of diffusion models simulated.
    """

    weight: Precision = field(default_factory=Precision)
    activation: Precision = field(default_factory=Precision)


Action = KVAction | WeightAction


@dataclass(frozen=True, kw_only=True)
class Entry:
    site: Site
    action: Action


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """When tokens are evicted: always after the prompt, and every `decode_every` new tokens.

    None means that tokens generated after the prompt all stay.  Prompts are read in pieces of
    `prefill_chunk` tokens with an eviction after each; None reads them at once.

    `online` divides the plan's tokens anew for each prompt.  By `Preference`: among layers, in
    proportion to what the layer's attention to that prompt prefers, while the layers are read;
    each is cut back to its part of what has arrived so far, so that memory holds the plan's tokens
    and one layer (CAKE, arXiv 2503.12491).  By `BestScores`: among all heads of all layers, once
    probes have scored the whole prompt (KVzip, arXiv 2505.23416).
    """

    decode_every: int | None = None
    prefill_chunk: int | None = None
    online: Online | None = None


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What was asked, as `kept`: the fraction of the full amount that may remain.

    The amount is the bytes of a language model's cache, or the FLOPs of a denoiser over all its
    steps.  `asked` is the user's own text ("0.2", "2GiB", "512tok", "3.2bits").  `reached` is
    the fraction the plan uses.  In language models absolute budgets hold at `length` tokens and
    below; `max_rows` is then the number of (layer, head, token) rows that is never exceeded,
    however long the prompt; not where some rows have few bits, so that their bytes differ.
    """

    asked: str
    kept: float
    reached: float
    length: int | None = None
    max_rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """How good the choice is: its value, a bound no plan can beat, and the relative gap.

    `value` and `bound` are in the objective of the solver (for `planned`: predicted damage).
    """

    solver: str
    value: float
    bound: float | None
    gap: float | None
    status: str


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Loss against the full cache on a set of prompts (see `cacheplan verify`).

    `kl` is the mean Kullback-Leibler divergence per continuation token, in nats.
    """

    kl: float
    agreement: float | None = None  # share of tokens with the same most likely next token
    recall: float | None = None  # share of answers that are all right
    full_recall: float | None = None
    nll: float | None = None  # mean negative log-likelihood of the true continuation
    full_nll: float | None = None
    prompts: int = 0
    digest: str | None = None  # of the prompts


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the plan came from: enough to make it again."""

    profile: str | None  # digest of the profile file
    prompts: str | None  # digest of the calibration prompts
    seed: int
    versions: tuple[tuple[str, str], ...]  # package and version, sorted
    command: str


@dataclass(frozen=True, kw_only=True)
class KVPlan:
    """A complete plan for the cache of a language model; see `plans/SPEC.md` for the file."""

    family: ClassVar[str] = LanguageSpec.family
    model: LanguageSpec
    recipe: str
    budget: Budget
    entries: tuple[Entry, ...]
    trigger: Trigger
    certificate: Certificate
    predicted: Damage | None
    measured: Damage | None
    provenance: Provenance
