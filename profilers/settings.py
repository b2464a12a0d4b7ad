"""What decides a profile's bytes, and the axes of the arrays it holds, per family of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cacheplan.types import DiffusionSpec, FeatureSite, KVAction, LanguageSpec, Precision


@dataclass(frozen=True, kw_only=True)
class KVSettings:
    """Two language profiles with equal settings can be merged.

    `probes` are the (candidate, keep) indices of the ablations, on the first `ablate` prompts.
    `keys`, `values`, `demoted` and `joint` say what is measured in few bits (`BitMenu`).
    """

    family: ClassVar[str] = "language"
    model: LanguageSpec
    candidates: tuple[KVAction, ...]
    keeps: tuple[float, ...]
    probes: tuple[tuple[int, int], ...]
    ablate: int
    prompts: int
    prompts_digest: str
    seed: int
    versions: tuple[tuple[str, str], ...]
    keys: tuple[Precision, ...] = ()
    values: tuple[Precision, ...] = ()
    demoted: tuple[int, ...] = ()
    joint: tuple[KVAction, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Two diffusion profiles with equal settings can be merged.

    At most `tokens` tokens of a feature are compared, `lags` steps back.  On the first `ablate`
    prompts each step's feature at `probes` is held alone; on the first `gradients` the effect of
    holding each site is told from gradients.  `linears` and `readers` are the layers
    whose ranges and moments are measured (`FeatureProfile`).
    """

    family: ClassVar[str] = "diffusion"
    model: DiffusionSpec
    sites: tuple[FeatureSite, ...]
    lags: int
    tokens: int
    probes: tuple[FeatureSite, ...]
    ablate: int
    prompts: int
    prompts_digest: str
    seed: int
    versions: tuple[tuple[str, str], ...]
    gradients: int = 0
    linears: tuple[str, ...] = ()
    readers: tuple[tuple[str, int], ...] = ()


Settings = KVSettings | FeatureSettings
FAMILIES: dict[str, type[KVSettings] | type[FeatureSettings]] = {
    cls.family: cls for cls in (KVSettings, FeatureSettings)
}
AXES: dict[str, tuple[str, ...]] = {
    "mass_curve": ("layer", "point"),
    "damage": ("layer", "kv_head", "candidate", "keep"),
    "ablation_damage": ("layer", "kv_head", "probe"),
    "ablation_kl": ("layer", "kv_head", "probe"),
    "key_damage": ("layer", "kv_head", "key_precision"),
    "value_damage": ("layer", "kv_head", "value_precision"),
    "demoted_damage": ("layer", "kv_head", "demoted", "keep", "tensor"),
    "joint_damage": ("layer", "kv_head", "joint"),
    "coarse_kl": ("layer", "kv_head", "tensor"),
    "coarse_damage": ("layer", "kv_head", "tensor"),
    "output_energy": ("layer", "kv_head"),
    "window_dispersion": ("layer",),
    "window_shift": ("layer",),
    "spectral_residual": ("layer",),
    "retrieval_score": ("layer", "query_head"),
    "block_distance": ("layer",),
    "image_mass": ("layer",),
    "image_share": (),
    "context_length": (),
    "continuation_length": (),
    "gram": ("site", "step", "lag"),
    "l1": ("site", "step", "lag"),
    "power": ("site",),
    "scale": (),
    "token_ratio": ("step",),
    "channel_gram": ("channel", "step", "lag"),
    "channel_mean": ("channel", "step"),
    "latent_l1": ("step", "lag"),
    "output_l1": ("step", "lag"),
    "forecast_l1": ("step", "lag", "older"),
    "modulated_l1": ("step", "lag"),
    "final_error": ("probe", "step"),
    "final_damage": ("probe", "step"),
    "output_damage": ("probe", "step"),
    "held_change": ("site", "step"),
    "text_constant": (),
    "activation_range": ("linear", "step", "end"),
    "reader_moments": ("reader_channel", "step", "moment"),
}
SIGNED = {"gram", "channel_gram", "channel_mean", "activation_range", "reader_moments"}
