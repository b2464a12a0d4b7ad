"""Curves of damage over budget as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from cacheplan.atomic import atomic_write
from cacheplan.errors import InputError, UnsupportedError

Curve = Sequence[tuple[float, float]]  # share and damage


def check_curves(path: Path) -> None:
    """InputError or UnsupportedError, before any work, if no curves can be drawn there."""
    if path.suffix.lower() != ".png":
        raise InputError(f'{path} has the ending "{path.suffix}", but curves are written as .png.')
    if find_spec("matplotlib") is None:
        raise UnsupportedError('Drawing curves needs matplotlib: pip install "cacheplan[plot]".')


def plot_curves(
    path: Path,
    curves: Mapping[str, Curve],
    *,
    bounds: Mapping[str, Curve] | None = None,
    share: str,
    damage: str,
    title: str,
) -> None:
    """Write a PNG; `share` and `damage` name the axes, `bounds` are dotted in the same colour."""
    from matplotlib.figure import Figure

    tall = max(4.0, 1.0 + 0.21 * len(curves))
    figure = Figure(figsize=(7 if len(curves) < 8 else 9, tall), layout="constrained", dpi=150)
    axes = figure.subplots()
    for name, curve in curves.items():
        own = [(x, y) for x, y in sorted(curve) if y > 0]  # the damage is shown by its logarithm
        if not own:
            continue
        (line,) = axes.plot(*np.array(own).T, "o-", label=name, markersize=4)
        proven = (bounds or {}).get(name)
        if proven:
            axes.plot(*np.array(proven).T, ":", color=line.get_color(), label="no plan below")
    axes.set(yscale="log", xlabel=share, ylabel=damage, title=title)
    axes.grid(alpha=0.3)
    if len(curves) < 8:
        axes.legend(fontsize="small")
    else:
        figure.legend(loc="outside right center", fontsize="small")
    data = io.BytesIO()
    figure.savefig(data, format="png")
    atomic_write(path, data.getvalue())
