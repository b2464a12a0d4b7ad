"""Which precisions of keys and values make sense, and which the runtime can store."""

from __future__ import annotations

from cacheplan.plans.rules import COUNT, NATURAL, need, one_of, refuse
from cacheplan.plans.storage import BLOCK, for_int8_product, in_few_bits, packed
from cacheplan.types import KVAction, LanguageSpec, Precision, Tier


def check_precision(precision: Precision, path: str) -> None:
    """PlanError for what no format means."""
    one_of(("model", "int", "float"), f"{path}.format", precision.format)
    one_of(("tensor", "token", "channel"), f"{path}.axis", precision.axis)
    need(1 <= precision.bits <= 32, f"{path}.bits", precision.bits, "an integer from 1 to 32")
    need(precision.group is None or precision.group >= 1, f"{path}.group", precision.group, COUNT)
    need(precision.residual >= 0, f"{path}.residual", precision.residual, NATURAL)


def check_tiers(action: KVAction, path: str) -> None:
    """PlanError where losers are demoted to nothing, or a low tier has no losers."""
    check_precision(action.key, f"{path}.key")
    check_precision(action.value, f"{path}.value")
    need(
        (action.low is not None) == (action.losers == "demote"),
        f"{path}.low",
        None if action.low is None else "given",
        f'{"an object" if action.low is None else "none"} where losers is "{action.losers}"',
    )
    if action.low is not None:
        check_precision(action.low.key, f"{path}.low.key")
        check_precision(action.low.value, f"{path}.low.value")


def check_storable(action: KVAction, model: LanguageSpec, decoding: bool, path: str) -> None:
    """UnsupportedError, with what is supported instead, for what the runtime cannot store."""
    if not in_few_bits(action):
        return
    tiers = [(path, action.key, action.value)]
    if action.low is not None:
        tiers.append((f"{path}.low", action.low.key, action.low.value))
        if not (packed(action.low.key) or packed(action.low.value)):
            refuse(f"{path}.low.key.format", "model", '"int" or "float" for what is demoted')
    for at, key, value in tiers:
        if for_int8_product(Tier(key=key, value=value)):
            _check_int8_product(action, model, at)
            continue
        _check_format(key, f"{at}.key", model.key_width)
        _check_format(value, f"{at}.value", model.value_width)
        if packed(value) and value.axis != "token":
            refuse(
                f"{at}.value.axis",
                value.axis,
                '"token" for values, or int8 in groups of 256 beside keys in int8 by token',
            )
        if key.separable:
            refuse(f"{at}.key.separable", key.separable, "false for keys")
    if decoding:
        refuse(
            f"{path}.key.bits and value.bits",
            [action.key.bits, action.value.bits],
            "16 each where trigger.decode_every is set",
        )
    if action.split != "equal":
        refuse(f"{path}.split", action.split, '"equal" where numbers have few bits')
    if action.merge is not None:
        refuse(f"{path}.losers", action.losers, '"evict" or "demote" where numbers have few bits')


def _check_int8_product(action: KVAction, model: LanguageSpec, path: str) -> None:
    if action.low is not None:
        refuse(f"{path}.losers", action.losers, '"evict" where values have int8 by channel')
    for name, width in (("key", model.key_width), ("value", model.value_width)):
        if width % 32:
            refuse(f"{path}.{name}.bits", 8, f"a width that is a multiple of 32, not {width}")


def _check_format(precision: Precision, path: str, width: int) -> None:
    if not packed(precision):
        return
    group, channel = precision.group, precision.axis == "channel"
    if precision.axis == "tensor":
        refuse(f"{path}.axis", precision.axis, '"token" or "channel"')
    if precision.format == "float":
        if precision.bits != 8:
            refuse(f"{path}.bits", precision.bits, "8 for float")
        if channel or group is not None or precision.separable:
            refuse(f"{path}.axis", precision.axis, '"token" without group for float')
        return
    if precision.bits not in (2, 4, 8):
        refuse(f"{path}.bits", precision.bits, "2, 4 or 8 for int")
    if width * precision.bits % 8:
        refuse(f"{path}.bits", precision.bits, f"bits that fill bytes with {width} channels")
    if channel and (group is None or (BLOCK % group and group % BLOCK)):
        refuse(f"{path}.group", group, f"a divisor or multiple of {BLOCK} tokens")
    if precision.separable and (channel or group is not None):
        refuse(f"{path}.separable", True, 'false unless axis is "token" without group')
