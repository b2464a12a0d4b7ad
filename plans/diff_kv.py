"""What changed at the sites of two KV plans, in lines for people."""

from __future__ import annotations

import dataclasses

from cacheplan.plans.words import plural, text
from cacheplan.types import Entry, KVPlan

WHOLE = -1  # stands for the head of a weight, which has none


def site_lines(a: KVPlan, b: KVPlan) -> list[str]:
    """Heads of a layer that change alike share a line, and so do layers whose heads do:
    "layers 0-3, 7, head 1: keep 0.2 -> 0.3".
    """
    before, after = _decisions(a), _decisions(b)
    heads: dict[tuple[int, str, str], list[int]] = {}  # by layer, what, change
    for place in sorted(before.keys() | after.keys()):
        layer, what, head = place
        if change := _change(before.get(place), after.get(place)):
            heads.setdefault((layer, what, change), []).append(head)
    everyone = list(range(max(a.model.kv_heads, b.model.kv_heads)))
    layers: dict[str, list[int]] = {}  # by the rest of the line
    for (layer, what, change), found in heads.items():
        who = "" if found == [WHOLE] else ", all heads"
        if found not in ([WHOLE], everyone):
            who = f", {plural('head', found)}"
        layers.setdefault(f"{what}{who}: {change}", []).append(layer)
    return [f"{plural('layer', found)}{rest}" for rest, found in layers.items()]


def _decisions(plan: KVPlan) -> dict[tuple[int, str, int], dict[str, str]]:
    """Fields of the action by (layer, what, head); heads decided together come one by one."""
    result = {}
    for entry in plan.entries:
        site, facts = entry.site, _facts(entry)
        what = "" if site.target == "kv" else f", {site.target}"
        heads = [WHOLE] if site.head is None else [site.head]
        if site.target == "kv" and site.head is None:
            heads = list(range(plan.model.kv_heads))
        for head in heads:
            result[site.layer, what, head] = facts
    return result


def _facts(entry: Entry) -> dict[str, str]:
    action = entry.action
    facts = {field.name: text(getattr(action, field.name)) for field in dataclasses.fields(action)}
    if entry.site.target == "kv":
        facts["heads"] = "together" if entry.site.head is None else "apart"
    return facts


def _change(before: dict[str, str] | None, after: dict[str, str] | None) -> str:
    if before is None:
        return "only in the second plan"
    if after is None:
        return "only in the first plan"
    return ", ".join(f"{k} {before[k]} -> {after[k]}" for k in before if before[k] != after[k])
