"""What changed at the sites of two feature plans, in lines for people."""

from __future__ import annotations

import dataclasses

from cacheplan.plans.rules import RANGES
from cacheplan.plans.words import bit_words, plural, site_words, text
from cacheplan.types import FeatureAction, FeaturePlan, FeatureSite

COMPUTED = "compute"  # what is done where a plan has no entry
FULL = "full bits"


def site_lines(a: FeaturePlan, b: FeaturePlan) -> list[str]:
    """Steps of a site that change alike share a line, and so do parts of one name in blocks
    whose steps do: "mlp of blocks 0-27 at steps 3, 5-7: compute -> reuse".
    """
    before, after = _decisions(a), _decisions(b)
    steps: dict[tuple[FeatureSite, str], list[int]] = {}  # by site and change
    for place in sorted(before.keys() | after.keys(), key=_order):
        site, step = place
        if change := _change(before.get(place), after.get(place)):
            steps.setdefault((site, change), []).append(step)
    blocks: dict[tuple[str, str], list[FeatureSite]] = {}  # by who and the rest of the line
    for (site, change), found in steps.items():
        who = site_words(site) if site.part in RANGES else site.part
        blocks.setdefault((who, f"at {plural('step', found)}: {change}"), []).append(site)
    lines = [f"{_who(who, sites)} {rest}" for (who, rest), sites in blocks.items()]
    return [*lines, *_linear_lines(a, b)]


def _linear_lines(a: FeaturePlan, b: FeaturePlan) -> list[str]:
    """Layers whose bits change alike share a line, and so do those whose numbers change alone."""
    before, after = ({entry.path: entry for entry in plan.linears} for plan in (a, b))
    found: dict[str, list[str]] = {}  # paths by change
    for path in dict.fromkeys((*before, *after)):
        old, new = before.get(path), after.get(path)
        if old == new:
            continue
        bits = [FULL if entry is None else bit_words(entry.action) for entry in (old, new)]
        change = "other ranges or corrections" if bits[0] == bits[1] else " -> ".join(bits)
        found.setdefault(change, []).append(path)
    return [
        f"{paths[0] if len(paths) == 1 else f'{len(paths)} linear layers'}: {change}, simulated"
        for change, paths in found.items()
    ]


def _decisions(plan: FeaturePlan) -> dict[tuple[FeatureSite, int], FeatureAction]:
    return {(entry.site, entry.step): entry.action for entry in plan.entries}


def _order(place: tuple[FeatureSite, int]) -> tuple[int, int, str, int]:
    site, step = place
    return site.first, site.last, site.part, step


def _who(who: str, sites: list[FeatureSite]) -> str:
    if sites[0].part in RANGES:
        return who
    return f"{who} of {plural('block', [site.first for site in sites])}"


def _change(before: FeatureAction | None, after: FeatureAction | None) -> str:
    if before is None or after is None:
        return f"{_words(before)} -> {_words(after)}"
    return ", ".join(
        f"{field.name} {text(old)} -> {text(new)}"
        for field in dataclasses.fields(FeatureAction)
        if (old := getattr(before, field.name)) != (new := getattr(after, field.name))
    )


def _words(action: FeatureAction | None) -> str:
    return COMPUTED if action is None else text(action).removeprefix("(do ").removesuffix(")")
