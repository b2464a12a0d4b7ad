"""Tables about diffusion models for the terminal, and the same as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from cacheplan.cli.kv_facts import statistic
from cacheplan.cli.numbers import ABSENT, count, interval, number, percent, size
from cacheplan.cli.tables import table_of
from cacheplan.plans.words import site_words
from cacheplan.types import FeaturePlan, FeatureProfile, FeatureSite

if TYPE_CHECKING:
    from cacheplan.picture_verification import PictureVerification

SHOWN_LAGS = (1, 2, 3, 4, 6, 8, 12, 16)


def picture_table(plan: FeaturePlan, found: PictureVerification) -> Table:
    """Predicted beside measured beside the full run."""
    table = table_of("", "predicted", "measured", "full run")
    damage, predicted = found.damage, plan.predicted
    flops = (found.planned_flops, found.counted_flops, found.full_flops)
    held = (found.planned_bytes, found.measured_bytes)
    table.add_row(
        "error", number(predicted.error if predicted else None), number(damage.error), "0"
    )
    table.add_row("PSNR", ABSENT, decibels(damage.psnr), ABSENT)
    table.add_row("SSIM", ABSENT, _ssim(damage.ssim), "1")
    if damage.lpips is not None:
        table.add_row("LPIPS", ABSENT, number(damage.lpips), "0")
    table.add_row("FLOPs", *(count(value).rstrip() for value in flops))
    table.add_row("of full", *(percent(value / found.full_flops) for value in flops))
    table.add_row("features", *map(size, held), "0 B")
    table.add_row("seconds", ABSENT, f"{found.seconds:.2f}", f"{found.full_seconds:.2f}")
    return table


def picture_comparison(names: Sequence[str], found: Sequence[PictureVerification]) -> Table:
    """One row per plan, and first the full run they are compared with."""
    learned = any(result.damage.lpips is not None for result in found)
    measures = ["compute", "error", "95 % interval", "PSNR", "SSIM", *["LPIPS"] * learned]
    table = table_of("", *measures, "seconds", "speedup")
    same = [percent(1.0), "0", ABSENT, ABSENT, "1", *["0"] * learned]
    table.add_row("full run", *same, f"{found[0].full_seconds:.2f}", "1x")
    for name, result in zip(names, found, strict=True):
        damage = result.damage
        table.add_row(
            name,
            percent(result.counted_flops / result.full_flops),
            number(damage.error),
            interval(result.error_per_prompt),
            decibels(damage.psnr),
            _ssim(damage.ssim),
            *[number(damage.lpips)] * learned,
            f"{result.seconds:.2f}",
            f"{result.full_seconds / result.seconds:.2f}x",
        )
    return table


def remarks(found: Sequence[PictureVerification]) -> list[Text]:
    """Faint lines to stand under a table: why there is no LPIPS in it."""
    reasons = dict.fromkeys(result.without_lpips for result in found)
    return [Text(reason, style="dim") for reason in reasons if reason]


def picture_facts(found: PictureVerification) -> dict[str, Any]:
    """A measurement without its damage."""
    facts = dataclasses.asdict(found)
    del facts["damage"]
    return facts


def lag_table(profile: FeatureProfile) -> Table:
    """How far features are from those some steps back: root mean square change, relative.

    The median over the steps; of the parts of all blocks the mean.
    """
    lags = [lag for lag in SHOWN_LAGS if lag <= profile.lags]
    table = table_of("change over steps", *map(str, lags))
    changes = relative_change(profile)
    rows: dict[str, list[int]] = {}
    for index, site in enumerate(profile.sites):
        if site.part == "delta" and site.first > 1 and site.last - site.first > 1:
            continue  # ranges that begin anywhere: they are much alike
        rows.setdefault(_kind(site, len(profile.model.blocks)), []).append(index)
    for name, indices in rows.items():
        shares = changes[indices].mean(0)  # [T, lags]
        cells = [percent(float(np.nanmedian(shares[lag:, lag - 1]))) for lag in lags]
        table.add_row(name, *cells)
    return table


def relative_change(profile: FeatureProfile) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`|F_t - F_{t-l}| / |F_t|` for l = 1 .. lags, `[sites, T, lags]`; 0 where t < l."""
    gram = statistic(profile, "gram")  # [sites, T, lags + 1]
    own = gram[:, :, 0]
    found = np.zeros((*gram.shape[:2], gram.shape[2] - 1))
    for lag in range(1, gram.shape[2]):
        if lag < gram.shape[1]:
            square = own[:, lag:] + own[:, :-lag] - 2 * gram[:, lag:, lag]
            found[:, lag:, lag - 1] = np.maximum(square, 0) / np.maximum(own[:, lag:], 1e-30)
    return np.sqrt(found)


def _kind(site: FeatureSite, blocks: int) -> str:
    if site.part == "delta" and site.last - site.first == 1 < blocks:
        return "delta of a block"
    if site.last - site.first == 1 and site.part not in ("delta", "hidden", "model", "branch"):
        return site.part
    return site_words(site)


def decibels(value: float | None) -> str:
    """A ratio of powers, such as a PSNR."""
    return ABSENT if value is None else f"{value:.1f} dB"


def _ssim(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"
