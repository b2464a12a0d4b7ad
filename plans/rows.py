"""How many tokens and bytes a plan keeps: the one place where this is computed.

A *row* is one (layer, kv head, token): one key and one value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from cacheplan.errors import InfeasibleError
from cacheplan.plans.storage import BLOCK, in_few_bits, row_storage
from cacheplan.types import AccumulatedAttention, KVAction, KVPlan, LanguageSpec, Site, Trigger

SLACK = BLOCK  # tokens by which storage grows when new ones are appended
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


def kept_rows(plan: KVPlan, length: int) -> Integers:
    """Tokens each head keeps of a prompt of `length` tokens, `[layers, kv_heads]`.

    A head's target is `keep * length`.  The total is the sum of targets rounded down, or
    `budget.max_rows` if that is less: the targets then shrink alike.  Largest remainders (ties:
    lower layer, then head) make integers from 1 to `length` of them.  A layer with one entry for
    all heads gets whole tokens for all of them, so it stays rectangular; where its `split` is
    adaptive, the runtime divides the layer's sum among the heads anew.

    Raises InfeasibleError if there is not one token for each head.
    """
    places, keep, cost = _units(plan)
    total = _total(plan, keep * cost, length)
    if total < cost.sum():
        raise InfeasibleError(_too_little(plan, keep * cost, length))
    target = keep * length
    asked, most = math.fsum(target * cost), plan.budget.max_rows
    if most is not None and asked > most:
        target *= most / asked
    units = _round(_lift(target, cost, total), cost, total)
    rows = np.zeros((plan.model.layers, plan.model.kv_heads), np.int64)
    for place, count in zip(places, units, strict=True):
        rows[place] = count
    return rows


def rows_after(plan: KVPlan, length: int, generated: int) -> Integers:
    """Tokens each head holds when `generated` more have followed the prompt, `[layers, kv_heads]`.

    With `trigger.decode_every` a head is cut back each time that many have been appended, to
    what it would keep of a prompt as long as the text so far, and never grows by being cut.
    """
    rows, appended = _evicted(plan, length, generated)
    return rows + appended


def protected_tokens(plan: KVPlan) -> int:
    """Tokens that each head has beforehand where the plan divides anew for each prompt."""
    actions = [entry.action for entry in plan.entries if isinstance(entry.action, KVAction)]
    return max(1, *(action.sinks + action.recent for action in actions))


def row_bytes(
    actions: Iterable[KVAction], spec: LanguageSpec, element_size: int, trigger: Trigger
) -> int:
    """Bytes of one row of a layer whose heads follow `actions`.

    Beside key and value these are, in float32, the score that decoding goes on adding to, and the
    logit bias of merged tokens; where one head needs such numbers, the whole layer holds them.
    """
    decoding = trigger.decode_every is not None
    score = bias = False
    for action in actions:
        score |= decoding and isinstance(action.scorer, AccumulatedAttention)
        bias |= action.merge is not None and action.merge.count_bias
    return spec.token_width * element_size + 4 * (score + bias)


def cache_bytes(
    plan: KVPlan,
    length: int,
    element_size: int,
    generated: int = 0,
    flushed: Mapping[Site, int] | None = None,
) -> int:
    """Bytes of storage allocated for one sequence; numbers take `element_size` bytes.

    An eviction leaves exactly the rows it keeps; the tokens appended since then take blocks of
    `SLACK` in every head.  Of heads in few bits, `flushed` says how many generated tokens have been
    packed so far; where it does not, they came one by one (`plans.storage`).
    """
    rows, appended = _evicted(plan, length, generated)
    capacity = rows + SLACK * -(-appended // SLACK)
    widths = plan.model.key_width, plan.model.value_width
    layers: dict[int, list[KVAction]] = {}
    few_bits: dict[int, int] = {}
    for entry in plan.entries:
        site, action = entry.site, entry.action
        if not isinstance(action, KVAction):
            continue
        layers.setdefault(site.layer, []).append(action)
        if in_few_bits(action):
            done = None if flushed is None else flushed.get(site)
            for head in range(plan.model.kv_heads) if site.head is None else [site.head]:
                kept = int(rows[site.layer, head])
                size = row_storage(
                    action, kept, length - kept, widths, element_size, appended, done
                )
                few_bits[site.layer] = few_bits.get(site.layer, 0) + size
                capacity[site.layer, head] = 0
    plain = sum(
        int(capacity[layer].sum()) * row_bytes(own, plan.model, element_size, plan.trigger)
        for layer, own in layers.items()
    )
    return plain + sum(few_bits.values())


def full_bytes(spec: LanguageSpec, length: int, element_size: int) -> int:
    """Bytes of the full cache of one sequence of `length` tokens."""
    return spec.rows * length * spec.token_width * element_size


def _evicted(plan: KVPlan, length: int, generated: int) -> tuple[Integers, int]:
    """Rows at the last eviction, and the tokens appended to every head since."""
    rows, every = kept_rows(plan, length), plan.trigger.decode_every
    if every is None:
        return rows, generated
    for end in range(length + every, length + generated + 1, every):
        rows = np.minimum(rows + every, kept_rows(plan, end))
    return rows, generated % every


def _place(site: Site) -> tuple[int, int | slice]:
    """Where the site is in an array `[layers, kv_heads]`."""
    return site.layer, slice(None) if site.head is None else site.head


def _units(plan: KVPlan) -> tuple[list[tuple[int, int | slice]], Floats, Integers]:
    """What is apportioned: places, the fraction each keeps, and the rows one token costs there."""
    entries = [(e.site, e.action) for e in plan.entries if isinstance(e.action, KVAction)]
    cost = [plan.model.kv_heads if site.head is None else 1 for site, _ in entries]
    keep = [action.keep for _, action in entries]
    places = [_place(site) for site, _ in entries]
    return places, np.array(keep, np.float64), np.array(cost, np.int64)


def _total(plan: KVPlan, weight: Floats, length: int) -> int:
    """Rows that may stay of `length` tokens; `weight` is keep times cost."""
    asked = math.floor(math.fsum(weight * length) + 1e-9)
    return asked if plan.budget.max_rows is None else min(asked, plan.budget.max_rows)


def _lift(target: Floats, cost: Integers, total: int) -> Floats:
    """Targets below one become one; the others shrink alike to pay for it."""
    low = target < 1
    scale = 1.0
    while low.any() and not low.all():
        room = total - cost[low].sum()
        scale = min(1.0, room / (target * cost)[~low].sum())
        lower = low | (target * scale < 1)
        if (lower == low).all():
            break
        low = lower
    return np.where(low, 1.0, target * scale)


def _round(target: Floats, cost: Integers, total: int) -> Integers:
    """Integers next to the targets, at most `total` rows in all, by largest remainder."""
    units = np.floor(target).astype(np.int64)
    left = total - int((units * cost).sum())
    for index in np.argsort(units - target, kind="stable"):
        if target[index] > units[index] and cost[index] <= left:
            units[index] += 1
            left -= int(cost[index])
    return units


def _too_little(plan: KVPlan, weight: Floats, length: int) -> str:
    heads, most = plan.model.rows, plan.budget.max_rows
    if most is not None and most < heads:
        return (
            f"the budget {plan.budget.asked} leaves {most} rows to {heads} heads, "
            f"expected one each; solve again for at least {heads} rows"
        )
    shortest = math.ceil(heads / math.fsum(weight)) + 1
    while _total(plan, weight, shortest - 1) >= heads:
        shortest -= 1
    return (
        f"the plan keeps too little of a prompt of {length} tokens to leave each head one; "
        f"give it at least {shortest} tokens or solve again with a larger budget"
    )
