"""KV plans: whether they make sense, whether they can be run, and what their model is."""

from __future__ import annotations

from itertools import pairwise

from cacheplan.errors import PlanError
from cacheplan.plans.rules import COUNT, check_budget, check_certificate, need, refuse
from cacheplan.plans.rules_kv import check_damage, check_entry, check_geometry
from cacheplan.plans.rules_storage import check_storable
from cacheplan.types import (
    FULL_ATTENTION,
    AccumulatedAttention,
    BestScores,
    Entry,
    KVAction,
    KVPlan,
    LanguageSpec,
    Online,
    Preference,
    ProbeAttention,
    Site,
    WindowAttention,
    needs_prompt,
)


def check_kv(plan: KVPlan) -> None:
    """Every rule a plan must obey on its own; PlanError for the first one broken.

    Types are taken as right: reading a file has checked them.
    """
    check_geometry(plan.model)
    check_budget(plan.budget)
    length, rows = plan.budget.length, plan.budget.max_rows
    need(length is not None and length >= 1, "budget.length", length, COUNT)
    need(rows is None or rows >= 1, "budget.max_rows", rows, COUNT)
    for index, entry in enumerate(plan.entries):
        check_entry(entry, plan.model, f"entries[{index}]")
    for index, (before, after) in enumerate(pairwise(plan.entries), start=1):
        if _order(before.site) >= _order(after.site):
            raise PlanError(
                f"entries[{index}] is {_words(after.site)} after {_words(before.site)}, "
                "expected each site once, sorted by layer, target and head"
            )
    _check_coverage(plan.entries, plan.model)
    every = plan.trigger.decode_every
    need(every is None or every >= 1, "trigger.decode_every", every, COUNT)
    chunk, online = plan.trigger.prefill_chunk, plan.trigger.online
    need(chunk is None or chunk >= 1, "trigger.prefill_chunk", chunk, COUNT)
    if isinstance(online, Preference):
        for name in ("tau_dispersion", "tau_shift"):
            tau = getattr(online, name)
            need(tau > 0, f"trigger.online.{name}", tau, "a number above 0")
    check_certificate(plan.certificate)
    for name, damage in (("predicted", plan.predicted), ("measured", plan.measured)):
        if damage is not None:
            check_damage(damage, name)


def check_runnable_kv(plan: KVPlan) -> None:
    """UnsupportedError, with what is supported instead, if the runtime cannot follow the plan."""
    for index, entry in enumerate(plan.entries):
        at, action = f"entries[{index}].action", entry.action
        if not isinstance(action, KVAction):
            refuse(f"entries[{index}].site.target", entry.site.target, '"kv"')
        if action.losers == "offload":
            refuse(f"{at}.losers", action.losers, '"evict", "merge" and "demote"')
        check_storable(action, plan.model, plan.trigger.decode_every is not None, at)
        if action.rank is not None:
            refuse(f"{at}.rank", action.rank, "none (all channels)")
        if plan.trigger.decode_every is not None:
            _check_while_decoding(action, at)
        if plan.trigger.online is not None:
            _check_online(plan.trigger.online, entry, action, at)
    if plan.trigger.online is not None:
        for name in ("decode_every", "prefill_chunk"):
            value = getattr(plan.trigger, name)
            if value is not None:
                refuse(f"trigger.{name}", value, "none where trigger.online is set")


def _check_online(online: Online, entry: Entry, action: KVAction, at: str) -> None:
    """What cannot be cut back further once it has been scored."""
    words = "where trigger.online is set"
    if entry.site.head is not None:
        refuse(at.replace("action", "site.head"), entry.site.head, f"none {words}")
    if action.split != "equal":
        refuse(f"{at}.split", action.split, f'"equal" {words}')
    if action.losers != "evict":
        refuse(f"{at}.losers", action.losers, f'"evict" {words}')
    if action.recent_share:
        refuse(f"{at}.recent_share", action.recent_share, f"0 {words}")
    if action.protect_text:
        refuse(f"{at}.protect_text", action.protect_text, f"false {words}")
    probed = isinstance(action.scorer, ProbeAttention)
    if probed and isinstance(online, Preference):
        refuse(f"{at}.scorer.name", action.scorer.name, f"scorers without probes {words}")
    if isinstance(online, BestScores) and not probed:
        refuse(f"{at}.scorer.name", action.scorer.name, f'"{ProbeAttention.name}" {words} to it')


def _check_while_decoding(action: KVAction, at: str) -> None:
    """What cannot be ranked from the newest tokens alone."""
    scorer = action.scorer
    if isinstance(scorer, WindowAttention) and scorer.window > 1:
        refuse(
            f"{at}.scorer.window",
            scorer.window,
            "1, or another scorer, where trigger.decode_every is set, "
            "because the window belongs to the prompt",
        )
    if needs_prompt(scorer):
        refuse(
            f"{at}.scorer.name",
            scorer.name,
            "any scorer of single tokens where trigger.decode_every is set",
        )
    if isinstance(scorer, AccumulatedAttention) and scorer.mean:
        refuse(f"{at}.scorer.mean", scorer.mean, "false where trigger.decode_every is set")
    if action.split != "equal":
        refuse(f"{at}.split", action.split, '"equal" where trigger.decode_every is set')
    if action.protect_text:
        refuse(f"{at}.protect_text", action.protect_text, "false where trigger.decode_every is set")


def _check_coverage(entries: tuple[Entry, ...], model: LanguageSpec) -> None:
    """Each kv head of each planned layer once; the entries are sorted, without repetition."""
    heads: dict[int, list[int | None]] = {layer: [] for layer in model.planned}
    for index, entry in enumerate(entries):
        if entry.site.target == "kv":
            if entry.site.layer not in heads:
                raise PlanError(
                    f"entries[{index}] names layer {entry.site.layer}, whose kind is "
                    f"{model.layer_kinds[entry.site.layer]}, expected a layer of {FULL_ATTENTION}"
                )
            heads[entry.site.layer].append(entry.site.head)
    for layer, found in heads.items():
        if found == [None] or (None not in found and len(found) == model.kv_heads):
            continue
        if None in found:
            raise PlanError(
                f"entries name layer {layer} as a whole and head {found[1]} of it, "
                "expected either all heads at once or each on its own"
            )
        raise PlanError(
            f"entries name {len(found)} kv heads of layer {layer}, "
            f"expected all {model.kv_heads} of them"
        )


def _order(site: Site) -> tuple[int, str, int]:
    """Sort key of sites; "all of them" (None) comes before the first."""
    return site.layer, site.target, -1 if site.head is None else site.head


def _words(site: Site) -> str:
    """A site for people, such as "kv of layer 3 head 1"."""
    head = "" if site.head is None else f" head {site.head}"
    return f"{site.target} of layer {site.layer}{head}"


def identity_kv(spec: LanguageSpec) -> dict[str, object]:
    """What decides whether two models share plans, in the order in which to report it."""
    return {
        "architecture": spec.architecture,
        "number of layers": spec.layers,
        **{f"kind of layer {index}": kind for index, kind in enumerate(spec.layer_kinds)},
        "number of kv heads": spec.kv_heads,
        "number of query heads": spec.query_heads,
        "key width": spec.key_width,
        "value width": spec.value_width,
        "rotary embedding": spec.rope,
        "image token": spec.image_token,
        "digest of configuration and weights": spec.digest,
    }
