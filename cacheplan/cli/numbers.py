"""Numbers in words for people."""

from __future__ import annotations

from collections.abc import Sequence

ABSENT = "-"


def percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f} %"


def number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3g}"


def interval(values: Sequence[float]) -> str:
    """Where the mean over prompts lies with 95 % confidence; nothing is known from one prompt."""
    if len(values) < 2:
        return ABSENT
    from cacheplan.intervals import mean_interval

    low, high = mean_interval(values)
    return f"{low:.2g} to {high:.2g}"


def size(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least one before the point."""
    value, units = float(count), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while value >= 1024 and unit != "TiB":
        value, unit = value / 1024, next(units)
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def count(value: float) -> str:
    """A large number in three digits and a unit of thousands, such as "15.8 G"."""
    units = iter(("", "k", "M", "G", "T", "P"))
    unit = next(units)
    while value >= 1000 and unit != "P":
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}"
