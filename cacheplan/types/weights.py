"""What a layer's part of a divided budget is in proportion to, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """Falling linearly with depth (PyramidKV, arXiv 2406.02069).

    The last layer gets 1 / `steepness` of the mean, the first as much more as it lacks.
    """

    name: ClassVar[str] = "pyramid"
    steepness: float = 20.0


@dataclass(frozen=True, kw_only=True)
class Preference:
    """dispersion^(1 / tau_dispersion) shift^(1 / tau_shift) of the attention (CAKE).

    The authors tune both exponents for each model and budget, around 1 (arXiv 2503.12491).
    """

    name: ClassVar[str] = "preference"
    tau_dispersion: float = 1.0
    tau_shift: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SpectralResidual:
    """Share of the energy of keys and of values above the passband (FlashCache)."""

    name: ClassVar[str] = "spectral_residual"


@dataclass(frozen=True, kw_only=True)
class OutputError:
    """Relative error of the layer's attention output under the recipe's own scorer (CompressKV)."""

    name: ClassVar[str] = "output_error"


@dataclass(frozen=True, kw_only=True)
class BlockDistance:
    """(minmax over layers of the cosine distance of block-wise computed keys)^power (EpiCache)."""

    name: ClassVar[str] = "block_distance"
    power: float = 1.1


@dataclass(frozen=True, kw_only=True)
class BestScores:
    """The best scores of all layers and heads win (KVzip, arXiv 2505.23416, section 3.3)."""

    name: ClassVar[str] = "best_scores"


LayerWeight = Pyramid | Preference | SpectralResidual | OutputError | BlockDistance
Online = Preference | BestScores  # what divides tokens anew for each prompt
