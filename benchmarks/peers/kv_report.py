"""From every arm's scores on every prompt to rows, the goal, and tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from intervals import mean_interval, ratio_interval

GOAL = 1 / 3  # our KL as a share of the best peer's
NEGLIGIBLE = 1e-4  # nats: where both are below, the ratio says nothing
OURS, BOTH = "cacheplan", "both"
Scored = list[dict[str, Any]]  # one `kv_measure.Score` for each prompt
Scores = dict[str, Scored]  # by JSON of [setting, budget, family, arm]


def rows(scores: Scores, prompts: int) -> list[dict[str, Any]]:
    """One row per setting, budget and arm, over the first `prompts` prompts."""
    full = {
        setting: found[:prompts]
        for (setting, _, family, arm), found in _keyed(scores)
        if arm == "full" and family == "transformers"
    }
    made = []
    for (setting, budget, family, arm), found in _keyed(scores):
        found = found[:prompts]
        kls = [score["kl"] for score in found]
        low, high = mean_interval(kls)
        answers = sum(score["answers"] for score in found)
        made.append(
            {
                "setting": setting,
                "budget": budget,
                "arm": arm,
                "family": BOTH if "our" in arm.split() else family,
                "kl": fmean(kls),
                "kl_interval": [low, high],
                "nll": fmean(score["nll"] for score in found),
                "full_nll": fmean(score["nll"] for score in full[setting]),
                "agreement": fmean(score["agreement"] for score in found),
                "recall": sum(score["right"] for score in found) / answers if answers else None,
                "kept": _share(found, full[setting], "logical"),
                "stored": _share(found, full[setting], "physical"),
                "stored_after_a_step": _share(found, full[setting], "stepped"),
            }
        )
    return made


def goals(made: list[dict[str, Any]], scores: Scores, prompts: int) -> list[dict[str, Any]]:
    """Our best row against the best peer at every budget, by bytes kept and by bytes stored."""
    kls = {
        (setting, budget, arm): [score["kl"] for score in found[:prompts]]
        for (setting, budget, _, arm), found in _keyed(scores)
    }
    found = []
    for setting in dict.fromkeys(row["setting"] for row in made):
        here = [row for row in made if row["setting"] == setting]
        for budget in dict.fromkeys(row["budget"] for row in here if row["budget"] is not None):
            own = [r for r in here if r["family"] == OURS and r["budget"] == budget]
            for bytes_of in ("kept", "stored"):
                others = [
                    r
                    for r in here
                    if r["family"] not in (OURS, BOTH)
                    and r["budget"] in (budget, None)
                    and r[bytes_of] <= budget + 0.005  # PyramidKV rounds each layer by itself
                ]
                ours, peer = _best(own), _best(others)
                ratio = ratio_interval(
                    kls[setting, ours["budget"], ours["arm"]],
                    kls[setting, peer["budget"], peer["arm"]],
                )
                found.append(
                    {
                        "setting": setting,
                        "budget": budget,
                        "bytes": bytes_of,
                        "ours": ours["arm"],
                        "peer": peer["arm"],
                        "ratio": ours["kl"] / max(peer["kl"], sys.float_info.min),
                        "interval": list(ratio),
                        "reached": ours["kl"] <= GOAL * peer["kl"],
                        "negligible": max(ours["kl"], peer["kl"]) < NEGLIGIBLE,
                    }
                )
    return found


def damage_lines(made: list[dict[str, Any]], setting: str) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of one setting's table: KL and recall of every arm at every budget."""
    here = [row for row in made if row["setting"] == setting]
    budgets = list(dict.fromkeys(row["budget"] for row in here if row["budget"] is not None))
    cell = {(row["arm"], row["budget"]): row for row in here}
    best = {b: min(row["kl"] for row in here if row["budget"] == b) for b in budgets}
    table = []
    for arm in dict.fromkeys(row["arm"] for row in here if row["budget"] is not None):
        texts = [_cell(cell.get((arm, budget)), best[budget]) for budget in budgets]
        stored = max(row["stored"] / row["kept"] for row in here if row["arm"] == arm)
        family = next(row["family"] for row in here if row["arm"] == arm)
        table.append([arm, family, *texts, "all" if stored > 1.1 else "kept"])
    return ["KL, recall", "of", *(f"keep {b:g}" for b in budgets), "stores"], table


def fixed_sizes(made: list[dict[str, Any]], setting: str) -> list[list[str]]:
    """Arm, share of the bytes, KL and recall of the caches that keep all tokens."""
    return [
        [row["arm"], f"{row['stored']:.3f}", _cell(row, -1.0)]
        for row in made
        if row["setting"] == setting and row["budget"] is None and row["arm"] != "full"
    ]


def _cell(row: dict[str, Any] | None, best: float) -> str:
    if row is None:
        return "-"
    kl = f"{row['kl']:.2g}" if row["kl"] >= 1e-4 else f"{row['kl']:.1e}"
    recall = "" if row["recall"] is None else f", {100 * row['recall']:.0f} %"
    return (f"**{kl}**" if row["kl"] == best else kl) + recall


def _keyed(scores: Scores) -> Iterable[tuple[tuple[Any, ...], Scored]]:
    return ((tuple(json.loads(key)), found) for key, found in scores.items())


def _best(candidates: list[dict[str, Any]]) -> dict[str, Any]:
    return min(candidates, key=lambda row: float(row["kl"]))


def _share(found: Scored, full: Scored, name: str) -> float:
    """Bytes over those of the full cache, on the prompts where they were counted.

    An arm that has failed at a prompt has no scores from there on.
    """
    both = [(own[name], whole[name]) for own, whole in zip(found, full, strict=False)]
    counted = [(own, whole) for own, whole in both if own is not None and whole is not None]
    return float(sum(own for own, _ in counted) / sum(whole for _, whole in counted))
