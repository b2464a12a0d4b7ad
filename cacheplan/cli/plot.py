"""The map of a plan as a picture."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cacheplan.atomic import atomic_write
from cacheplan.cli.facts import model_words
from cacheplan.cli.feature_map import COMPUTED, feature_map, legend
from cacheplan.cli.heatmap import plan_heatmap
from cacheplan.cli.numbers import percent
from cacheplan.errors import InputError, UnsupportedError
from cacheplan.types import FeaturePlan, KVPlan, Plan

_COLOURS = ("#e8e8e8", "#3b528b", "#21918c", "#5ec962", "#fde725", "#440154", "#b5367a", "#fb8861")


def plot_plan(plan: Plan, path: Path) -> None:
    """Write a PNG: kept tokens of layers x heads, or what is done in blocks x steps."""
    if path.suffix.lower() != ".png":
        raise InputError(f'{path} has the ending "{path.suffix}", but maps are written as .png.')
    if find_spec("matplotlib") is None:
        raise UnsupportedError('Drawing a map needs matplotlib: pip install "cacheplan[plot]".')
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained", dpi=150)
    axes = figure.subplots()
    if isinstance(plan, KVPlan):
        _kv(axes, figure, plan)
    else:
        _features(axes, plan)
    axes.set_title(f"{plan.recipe}, {percent(plan.budget.reached)} of {model_words(plan.model)}")
    data = io.BytesIO()
    figure.savefig(data, format="png")
    atomic_write(path, data.getvalue())


def _kv(axes: Any, figure: Any, plan: KVPlan) -> None:
    heatmap, _ = plan_heatmap(plan)
    image = axes.imshow(heatmap.shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(image, label="share of tokens kept")
    axes.set(xlabel="kv head", ylabel="layer")


def _features(axes: Any, plan: FeaturePlan) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    found = feature_map(plan)
    used = sorted(set("".join(found.cells)), key=lambda letter: (letter != COMPUTED, letter))
    table = np.array([[used.index(letter) for letter in line] for line in found.cells])
    colours = [("#222222", *_COLOURS)[index % (len(_COLOURS) + 1)] for index in range(len(used))]
    axes.pcolormesh(
        table,
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=len(used) - 0.5,
        edgecolors="white",
        linewidth=0.5,
    )
    axes.invert_yaxis()
    axes.set(xlabel="step", ylabel="block")
    patches = [Patch(color=c, label=t.strip()) for c, t in zip(colours, legend(found), strict=True)]
    axes.figure.legend(handles=patches, loc="outside lower center", fontsize="small")
