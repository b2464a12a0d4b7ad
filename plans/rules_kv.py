"""What each part of a KV plan may say on its own; `check_kv` holds the rules across parts."""

from __future__ import annotations

from cacheplan.plans.rules import COUNT, NATURAL, POSITIVE, SHARE, need, one_of
from cacheplan.types import (
    Damage,
    Entry,
    KVAction,
    LanguageSpec,
    Precision,
    Scorer,
    Site,
    WeightAction,
    WindowAttention,
)

TARGETS = {"kv": KVAction, "weight": WeightAction}


def check_geometry(model: LanguageSpec) -> None:
    need(bool(model.layer_kinds), "model.layer_kinds", model.layer_kinds, "at least one layer")
    for name in ("query_heads", "kv_heads", "key_width", "value_width", "max_length"):
        value = getattr(model, name)
        need(value >= 1, f"model.{name}", value, COUNT)


def check_damage(damage: Damage, path: str) -> None:
    for name in ("kl", "nll", "full_nll"):
        value = getattr(damage, name)
        need(value is None or value >= 0, f"{path}.{name}", value, POSITIVE)
    for name in ("agreement", "recall", "full_recall"):
        value = getattr(damage, name)
        need(value is None or 0 <= value <= 1, f"{path}.{name}", value, SHARE)
    need(damage.prompts >= 0, f"{path}.prompts", damage.prompts, NATURAL)


def check_entry(entry: Entry, model: LanguageSpec, path: str) -> None:
    """PlanError if the entry contradicts itself or lies outside the model."""
    _check_site(entry.site, model, f"{path}.site")
    action, at = entry.action, f"{path}.action"
    need(
        isinstance(action, TARGETS[entry.site.target]),
        f"{path}.site.target",
        entry.site.target,
        "the kind of its action",
    )
    if isinstance(action, KVAction):
        _check_kv(action, entry.site, at)
    else:
        _check_precision(action.weight, f"{at}.weight")
        _check_precision(action.activation, f"{at}.activation")


def _check_site(site: Site, model: LanguageSpec, path: str) -> None:
    one_of(tuple(TARGETS), f"{path}.target", site.target)
    for name, value, end in (
        ("layer", site.layer, model.layers),
        ("head", site.head, model.kv_heads),
    ):
        if value is not None:
            inside = 0 <= value < end
            need(inside, f"{path}.{name}", value, f"an integer from 0 below {end}")


def _check_kv(action: KVAction, site: Site, path: str) -> None:
    need(0 < action.keep <= 1, f"{path}.keep", action.keep, "a number above 0 and at most 1")
    need(action.sinks >= 0, f"{path}.sinks", action.sinks, NATURAL)
    need(action.recent >= 0, f"{path}.recent", action.recent, NATURAL)
    need(0 <= action.recent_share <= 1, f"{path}.recent_share", action.recent_share, SHARE)
    need(0 <= action.floor <= 1, f"{path}.floor", action.floor, SHARE)
    one_of(("head", "layer"), f"{path}.share", action.share)
    one_of(("equal", "adaptive"), f"{path}.split", action.split)
    one_of(("evict", "merge", "demote", "offload"), f"{path}.losers", action.losers)
    if site.head is not None:
        need(
            action.share == "head", f"{path}.share", action.share, '"head" in an entry for one head'
        )
        need(
            action.split == "equal",
            f"{path}.split",
            action.split,
            '"equal" in an entry for one head',
        )
    if action.split == "adaptive":
        need(
            action.share == "head", f"{path}.share", action.share, '"head" where split is adaptive'
        )
    _check_scorer(action.scorer, f"{path}.scorer")
    _check_precision(action.key, f"{path}.key")
    _check_precision(action.value, f"{path}.value")
    need(action.rank is None or action.rank >= 1, f"{path}.rank", action.rank, COUNT)


def _check_scorer(scorer: Scorer, path: str) -> None:
    if isinstance(scorer, WindowAttention):
        need(scorer.window >= 1, f"{path}.window", scorer.window, COUNT)
        odd = scorer.pool >= 1 and scorer.pool % 2 == 1
        need(odd, f"{path}.pool", scorer.pool, "an odd integer of at least 1")
        one_of(("average", "max"), f"{path}.pooling", scorer.pooling)


def _check_precision(precision: Precision, path: str) -> None:
    one_of(("model", "int", "float"), f"{path}.format", precision.format)
    one_of(("tensor", "token", "channel"), f"{path}.axis", precision.axis)
    need(1 <= precision.bits <= 32, f"{path}.bits", precision.bits, "an integer from 1 to 32")
    need(precision.group is None or precision.group >= 1, f"{path}.group", precision.group, COUNT)
    need(precision.residual >= 0, f"{path}.residual", precision.residual, NATURAL)
