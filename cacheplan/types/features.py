"""Plans for the features of diffusion models: which are not computed at which step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cacheplan.types.model import DiffusionSpec, FeatureSite
from cacheplan.types.plan import Budget, Certificate, KVPlan, Provenance, WeightAction


@dataclass(frozen=True, kw_only=True)
class FeatureAction:
    """What takes the place of a feature that is not computed.

    "reuse" and "forecast" put a combination of computed features in its place, where F_0 is the
    newest one, F_1 the one before it, and so on:

        channel_scale * (scale * sum_i w_i F_i + shift) + channel_shift

    The w_i are `weights` where `basis` is "fitted"; otherwise they follow from basis, order, the
    steps computed so far and the noise levels (`plans/forecast.py`).  Empty channel vectors mean
    1 and 0; others have one number per channel.  "skip" leaves the blocks out, as if their delta
    were 0.
    """

    do: str  # "reuse", "forecast" or "skip"
    order: int = 0
    basis: str = "hold"
    weights: tuple[float, ...] = ()
    scale: float = 1.0
    shift: float = 0.0
    channel_scale: tuple[float, ...] = ()
    channel_shift: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FeatureEntry:
    """A feature that is not computed at `step`; whatever no entry names is computed."""

    site: FeatureSite
    step: int
    action: FeatureAction


@dataclass(frozen=True, kw_only=True)
class LinearEntry:
    """A linear layer of the denoiser whose numbers have few bits, simulated.

    Weights and activations are rounded to what the bits can tell and multiplied as ordinary
    floats: what that costs in quality can be compared, time and memory are those of full numbers.

    `ranges` are the lowest and highest activation at each step, 0 always between them; beyond
    them activations are clipped, and where both are 0 they stay as they are.  `channel_scale` and
    `channel_shift` correct the output channels, a vector for each step; empty means 1 and 0.
    """

    path: str  # in the denoiser, of others than the first with its name before
    action: WeightAction
    ranges: tuple[tuple[float, float], ...] = ()
    channel_scale: tuple[tuple[float, ...], ...] = ()
    channel_shift: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rescale:
    """A polynomial from a change of the input to one of the output, highest power first.

    It was fitted to changes from `low` to `high` and means nothing beyond (`plans/rescale.py`).
    """

    coefficients: tuple[float, ...]
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A guard at planned skips: it may turn one into a computation, never the other way round.

    `signal` is what is measured ("first_block", "forecast", "modulation", "secant"), and the
    feature is computed where it exceeds `threshold`.  `accumulate` says whether the signal is
    summed over the steps since the last computation.  No more than `max_consecutive` steps in a
    row are skipped, none of the first `warmup` and the last `protect_last`.  `blocks` is how many
    first blocks a signal may run, `order` that of the forecast it compares with, `rescale` what
    a change of the modulated input means for the output.
    """

    signal: str
    threshold: float
    accumulate: str = "none"
    max_consecutive: int | None = None
    warmup: int = 0
    protect_last: int = 0
    blocks: int = 1
    order: int = 0
    rescale: Rescale | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureDamage:
    """Loss against the full run from the same noise, mean over prompts.

    `error` is the root mean square of the difference of the final latents relative to that of
    the full run's; `psnr` (decibels), `ssim` and `lpips` compare the decoded images.
    """

    error: float
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    prompts: int = 0
    digest: str | None = None  # of the prompts


@dataclass(frozen=True, kw_only=True)
class FeaturePlan:
    """A complete plan for the features of a diffusion model; see `plans/SPEC.md` for the file.

    Entries are sorted by step, then first block, last block and part.  `dt_scale` multiplies the
    scheduler's step sizes, one number per step; empty leaves them alone.  With `text_once` the
    text's keys and values (`Part.text`) are computed at the first step of each denoiser and used
    in all later ones: they stay the same.  `linears` are layers with few bits, simulated.
    """

    family: ClassVar[str] = DiffusionSpec.family
    model: DiffusionSpec
    recipe: str
    budget: Budget
    entries: tuple[FeatureEntry, ...]
    gate: Gate | None = None
    dt_scale: tuple[float, ...] = ()
    text_once: bool = False
    linears: tuple[LinearEntry, ...] = ()
    certificate: Certificate
    predicted: FeatureDamage | None
    measured: FeatureDamage | None
    provenance: Provenance


Plan = KVPlan | FeaturePlan
