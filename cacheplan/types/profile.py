"""Profiles: streaming statistics of one model on calibration prompts, as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cacheplan.types.model import DiffusionSpec, FeatureSite, LanguageSpec
from cacheplan.types.plan import KVAction, Precision

RANGE_UNIT = 256.0  # so that sums of what profiles hold may be of any half-precision numbers


@dataclass(frozen=True, eq=False)
class Statistic:
    """Mean and spread of one measured array over prompts; `axes` names its dimensions."""

    axes: tuple[str, ...]
    count: int
    mean: NDArray[np.float64]
    std: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class KVProfile:
    """What `cacheplan profile` measured on a language model.

    Statistics (L layers, K kv heads, A candidates, G keep fractions, M + 1
    points of a curve):

    `mass_curve` `[L, M+1]`: share of accumulated attention held by the best i/M of the tokens.
    `damage` `[L, K, A, G]`: squared error of the head's attention output on the continuation's
    queries when the candidate keeps that fraction of the context, summed over channels and the
    group's query heads, mean over queries.
    `ablation_damage`, `ablation_kl` `[L, K, P]`: damage and divergence of the whole model when
    this head alone is cut back by probe p, on the first few prompts; `probes` holds the
    (candidate, keep) indices.
    `output_energy` `[L, K]`: squared norm of the head's attention output, in the unit of `damage`.
    `window_dispersion`, `window_shift` `[L]`: entropy of the last 32 queries' attention to the
    tokens before them, and its variance from query to query.
    `spectral_residual` `[L]`: share of the energy of keys and of values in high frequencies.
    `retrieval_score` `[L, H]`: attention on an answer's words in the context while it is said;
    only from prompts with such answers.
    `block_distance` `[L]`: how far keys move (cosine distance) when the context is read in blocks;
    from the prompts that are ablated.
    `image_mass` `[L]`, `image_share` `[]`: share of image tokens in the attention that the
    continuation pays to the context, and in the context; only from prompts with images.
    `context_length`, `continuation_length` `[]`: tokens.

    In few bits, unless the profile was taken without (FK, FV precisions `keys` and `values`):
    `key_damage` `[L, K, FK]`, `value_damage` `[L, K, FV]`: damage of the whole context with keys,
    or values, in that precision.
    `demoted_damage` `[L, K, A', G, 2]`: damage of the candidates `demoted` when all tokens stay,
    but what would be evicted has keys, or values, in the last of the precisions.
    `joint_damage` `[L, K, J]`: damage of the actions `joint` as the runtime stores them.
    `coarse_kl`, `coarse_damage` `[L, K, 2]`: divergence of the model and damage when this head
    alone has all keys, or values, in the last of the precisions; on every second of the prompts
    that are ablated.  Damage in few bits is that of every other query, without a rhythm.

    `keeps` are the G fractions in ascending order, `candidates` the A actions (their own `keep`
    is 1.0 and without meaning).
    """

    model: LanguageSpec
    statistics: dict[str, Statistic]
    keeps: tuple[float, ...]
    candidates: tuple[KVAction, ...]
    probes: tuple[tuple[int, int], ...]
    prompts: int
    prompts_digest: str
    seed: int
    keys: tuple[Precision, ...] = ()
    values: tuple[Precision, ...] = ()
    demoted: tuple[int, ...] = ()
    joint: tuple[KVAction, ...] = ()
    digest: str = ""
    versions: tuple[tuple[str, str], ...] = field(default=())


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureProfile:
    """What `cacheplan profile` measured on a diffusion model.

    `sites` is the axis "site" of the statistics, `lags` how many steps back features were
    compared, and `probes` are the sites that were left out alone to see the damage.

    `held_change` `[site, T]`, where gradients were followed: mean square change of the model's
    output, relative to its mean square, when the site alone is held at a step (to first order).

    `text_constant` `[]`, of models that have such: 1 where the keys and values of the text
    (`Part.text`) were bit for bit the same at all steps of a denoiser, else 0.

    `linears` are the paths of the linear layers in the blocks, and of those behind the last block
    that read what it returns; these are also `readers`, with their number of output channels.
    `activation_range` `[linear, T, 2]`: lowest and highest number that the layer is given at a
    step of a prompt, at most and at least 0 (both 0 where it does not run), in `RANGE_UNIT`.
    `reader_moments` `[reader's channels, T, 4]`: with q the output channel with weights and
    activations in 8 bits, and e what the full one is more, the means of e, q, eq and q^2; in
    `RANGE_UNIT` or its square.
    """

    model: DiffusionSpec
    statistics: dict[str, Statistic]
    sites: tuple[FeatureSite, ...]
    lags: int
    probes: tuple[FeatureSite, ...]
    prompts: int
    prompts_digest: str
    seed: int
    linears: tuple[str, ...] = ()
    readers: tuple[tuple[str, int], ...] = ()
    digest: str = ""
    versions: tuple[tuple[str, str], ...] = field(default=())


Profile = KVProfile | FeatureProfile
