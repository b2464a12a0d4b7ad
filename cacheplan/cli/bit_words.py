"""Keys and values in few bits, in words."""

from __future__ import annotations

from collections.abc import Iterator

from cacheplan.plans.storage import in_few_bits, packed
from cacheplan.readings_bits import sums_checked
from cacheplan.types import KVAction, KVPlan, KVProfile, Precision, Tier


def precision_words(precision: Precision) -> str:
    """Such as "int4 per channel and 64 tokens"."""
    if not packed(precision):
        return "as they are"
    words = f"{'fp' if precision.format == 'float' else 'int'}{precision.bits} per {precision.axis}"
    if precision.group is not None:
        unit = "tokens" if precision.axis == "channel" else "channels"
        words += f" and {precision.group} {unit}"
    if precision.separable:
        words += ", channels scaled"
    return words


def bit_words(action: KVAction) -> list[str]:
    """What an action says about precision, in parts."""
    if not in_few_bits(action):
        return []
    words = [f"keys {precision_words(action.key)}", f"values {precision_words(action.value)}"]
    exact = max(action.key.residual, action.value.residual)
    if exact:
        words.append(f"the newest {exact} exact")
    if action.low is not None:
        words.append(
            f"the others' keys {precision_words(action.low.key)}, "
            f"their values {precision_words(action.low.value)}"
        )
    return words


def bit_map(plan: KVPlan) -> Iterator[str]:
    """A line per layer with bits of keys and values of every head; nothing if all have 16.

    "4/2" are the tokens that stay, and "8/4>2/2" also those that are demoted.
    """
    cells: dict[int, list[str]] = {}
    few = False
    for entry in plan.entries:
        action = entry.action
        if isinstance(action, KVAction):
            few = few or in_few_bits(action)
            heads = plan.model.kv_heads if entry.site.head is None else 1
            cells.setdefault(entry.site.layer, []).extend([_cell(action)] * heads)
    if few:
        for layer, found in cells.items():
            yield f"{layer:>5} " + " ".join(f"{own:>8}" for own in found)


def sum_lines(profile: KVProfile) -> Iterator[str]:
    """How well errors of tokens and of bits add up, for a profile that measured it."""
    for action, ratio in sums_checked(profile) if profile.keys else ():
        share = f"{100 * action.keep:g} % by {action.scorer.name}"
        yield f"  {ratio:.2f}  {share}, {_cell(action)} bits"


def _cell(action: KVAction) -> str:
    high = _bits(Tier(key=action.key, value=action.value))
    return high if action.low is None else f"{high}>{_bits(action.low)}"


def _bits(tier: Tier) -> str:
    return f"{tier.key.bits}/{tier.value.bits}"
