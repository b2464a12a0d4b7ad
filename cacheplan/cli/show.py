"""`cacheplan show`: a plan or a profile as a map, or what a device would run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cacheplan import api
from cacheplan.cli.bit_words import bit_map, sum_lines
from cacheplan.cli.device import show_device
from cacheplan.cli.facts import model_words, plan_words, profile_facts, profile_words
from cacheplan.cli.feature_map import change_maps, feature_map, sensitivity_lines
from cacheplan.cli.feature_map import legend as feature_legend
from cacheplan.cli.feature_tables import lag_table
from cacheplan.cli.heatmap import legend, plan_heatmap, sensitivity_heatmap
from cacheplan.cli.kv_facts import action_words, image_words
from cacheplan.cli.numbers import number
from cacheplan.cli.options import PLAN, PROFILE, Json
from cacheplan.cli.output import draw, emit, say, suggest
from cacheplan.cli.plot import plot_plan
from cacheplan.cli.tables import damage_table
from cacheplan.errors import InputError
from cacheplan.plans.codec import encode
from cacheplan.types import FeaturePlan, FeatureProfile, KVPlan, KVProfile, Plan


def show(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="A plan or a profile; plan.json if not given."),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="FILE", help="Also draw a plan's map into a picture."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help='Instead of a file: what every operation runs on a device, and why ("auto": the '
            "GPU if there is one).",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a plan or a profile as a map: of layers x heads, or of blocks x steps.

    \b
    Examples:
      cacheplan show plan.json
      cacheplan show plan.json --png plan.png
      cacheplan show profile.safetensors
      cacheplan show --device auto
    """
    if device is not None:
        if path is not None or png is not None:
            raise InputError("--device shows a device instead of a file: leave the file out.")
        show_device(device, as_json=as_json)
        return
    if path is None:
        path = PROFILE if PROFILE.exists() and not PLAN.exists() else PLAN
    if _holds_profile(path):
        if png is not None:
            raise InputError(f"--png draws plans, but {path} is a profile: leave it out.")
        profile = api.load_profile(path)
        if as_json:
            emit({"file": str(path), **profile_facts(profile)})
        elif isinstance(profile, KVProfile):
            _show_kv_profile(path, profile)
        else:
            _show_feature_profile(path, profile)
        suggest(f"cacheplan solve {path} --budget {0.2 if isinstance(profile, KVProfile) else 0.4}")
        return
    plan = api.load_plan(path)
    if png is not None:
        plot_plan(plan, png)
        say(f"{png} shows the map.")
    if as_json:
        emit({"file": str(path), **encode(Plan, plan)})
    else:
        print(
            "\n".join([f"{path}: {plan.recipe} for {model_words(plan.model)}", *plan_words(plan)])
        )
        if isinstance(plan, KVPlan):
            _show_kv_map(plan)
        else:
            _show_feature_map(plan)
    suggest(
        f"cacheplan verify {path} --write"
        if plan.measured is None
        else f"cacheplan run --plan {path}"
    )


def _holds_profile(path: Path) -> bool:
    """Whether a file is in the safetensors format: a length of 8 bytes, then a JSON header."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        start = b""
    return path.suffix == PROFILE.suffix or (start[8:] == b"{" and start[:1] != b"{")


def _show_kv_map(plan: KVPlan) -> None:
    heatmap, scorers = plan_heatmap(plan)
    print("\nkept tokens of each head in percent, and who chooses them:")
    draw(heatmap)
    print("\n".join(legend(scorers)))
    if lines := list(bit_map(plan)):
        print("\nbits of keys and values of each head, after > those of demoted tokens:")
        print("\n".join(lines))


def _show_feature_map(plan: FeaturePlan) -> None:
    found = feature_map(plan)
    print("\nwhat is done in each block at each step:")
    draw(found)
    print("\n".join(feature_legend(found)))


def _show_kv_profile(path: Path, profile: KVProfile) -> None:
    print(f"{path}: {profile_words(profile)}")
    if pictured := image_words(profile):
        print(pictured)
    print()
    draw(damage_table(profile, map(action_words, profile.candidates)))
    heatmap, most, keep = sensitivity_heatmap(profile)
    print(f"\nKL when one head alone is cut back, in percent of the largest ({number(most)}), and")
    print(f"the scorer that does least damage to the head when {100 * keep:g} % are kept:")
    draw(heatmap)
    print("\n".join(legend(candidate.scorer for candidate in profile.candidates)))
    if lines := list(sum_lines(profile)):
        print("\ndamage of fewer tokens in fewer bits, over the sum of what each does alone:")
        print("\n".join(lines))


def _show_feature_profile(path: Path, profile: FeatureProfile) -> None:
    print(f"{path}: {profile_words(profile)}\n")
    draw(lag_table(profile))
    print()
    draw(*sensitivity_lines(profile))
    for words, found in change_maps(profile):
        print(f"\nhow far the model's output moves at a step that holds {words}:")
        draw(found)
