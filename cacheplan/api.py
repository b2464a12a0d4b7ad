"""What the command line does, as functions: profile, merge, solve, verify, generate, draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from cacheplan import diffusion, language
from cacheplan.drawing import Drawing, draw
from cacheplan.errors import InputError
from cacheplan.generation import Generation, generate
from cacheplan.placement import Placement
from cacheplan.plans.io import read_plan as load_plan
from cacheplan.plans.io import write_plan as save_plan
from cacheplan.processes import ALONE, Processes, launched
from cacheplan.types import (
    DiffusionSpec,
    FeaturePlan,
    FeatureProfile,
    KVPlan,
    KVProfile,
    LanguageSpec,
    Plan,
    Profile,
)

if TYPE_CHECKING:
    from cacheplan.picture_verification import PictureVerification, Row
    from cacheplan.profilers.collect import Progress
    from cacheplan.verification import Verification

__all__ = [
    "Comparison",
    "Drawing",
    "Generation",
    "Placement",
    "Processes",
    "compare",
    "draw",
    "family_of",
    "generate",
    "launched",
    "load_plan",
    "load_profile",
    "merge",
    "profile",
    "refine",
    "save_plan",
    "solve",
    "verify",
]

FAMILIES = (LanguageSpec.family, DiffusionSpec.family)

AnyPlan = TypeVar("AnyPlan", bound=Plan)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A measurement per plan, all of one family; for pictures, also those of every prompt.

    A row has the picture of the full run and one of each plan.
    """

    found: tuple[Verification | PictureVerification, ...]
    rows: tuple[Row, ...]


def family_of(model: str | None, family: str | None = None) -> str:
    """ "language" or "diffusion": as asked, else what the model's folder holds."""
    from cacheplan.zoo import embedded_path

    if family is not None:
        if family not in FAMILIES:
            raise InputError(f'The family is "{family}", expected {" or ".join(FAMILIES)}.')
        return family
    folder = (embedded_path(model) or Path(model)) if model else None
    pipeline = folder is not None and (folder / "model_index.json").is_file()
    return FAMILIES[pipeline]


def profile(
    model: str | None = None,
    *,
    out: Path,
    family: str | None = None,
    prompts: Path | None = None,
    limit: int | None = None,
    ablate: int | None = None,
    gradients: int | None = None,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    split: float | None = None,
    settings: Mapping[str, Any] | None = None,
    lags: int | None = None,
    tokens: int | None = None,
    processes: Processes = ALONE,
    placement: Placement | None = None,
    bits: bool = True,
    recipes: Sequence[str] | None = None,
) -> Profile | None:
    """Measure a model on calibration prompts and write the profile to `out`.

    A run that was interrupted goes on where it stopped (`out` with the suffix `.part`).  With
    `shard=(i, n)`, only every n-th prompt from the i-th is measured; `merge` joins the files,
    and None is returned.  With `processes=launched()` under torchrun, the processes divide the
    prompts; the first writes the profile and returns it, the others return None.

    `family` is "language" or "diffusion"; a folder tells by itself.  The first `ablate` prompts
    (8, or 2 in diffusion) are run again with one thing cached at a time.  For language models,
    `split` is the share of a plain text that is context (0.8), and only what `planned` and the
    named `recipes` need is measured (["all"]: everything; None: all but what needs passes of its
    own), in few bits only with `bits`.  For diffusion models, `settings` are those of the
    pipeline's call (`{"num_inference_steps": 30}`), features are compared up to `lags` steps back
    (16) at up to `tokens` tokens (512), and on the first `gradients` prompts (0) gradients tell how
    much each part of each block matters at each step.  A language model too large for one device
    is divided over several by `placement`.
    """
    common: dict[str, Any] = {
        "out": out,
        "prompts": prompts,
        "limit": limit,
        "ablate": ablate,
        "seed": seed,
        "shard": shard,
        "device": processes.device(device),
        "dtype": dtype,
        "progress": progress,
        "processes": processes,
    }
    if placement is not None and processes.size > 1:
        raise InputError(
            "A device map divides one model over the devices, of which torchrun gives each process "
            "its own: leave out torchrun, or start one process per --shard."
        )
    if family_of(model, family) == LanguageSpec.family:
        _only("diffusion", settings=settings or None, lags=lags, tokens=tokens, gradients=gradients)
        return language.profile_language(
            model, split=split, placement=placement, bits=bits, recipes=recipes, **common
        )
    few = None if bits else False
    _only("language", split=split, device_map=placement, bits=few, recipe=recipes)
    return diffusion.profile_features(
        model,
        settings=settings or {},
        lags=lags,
        tokens=tokens,
        gradients=gradients,
        **common,
    )


def merge(parts: Sequence[Path], *, out: Path) -> Profile:
    """Join the shards of one profile; the result has the bytes of an undivided run."""
    from cacheplan.profilers.store import finish, read_state, write_state
    from cacheplan.profilers.store import merge as merge_states

    if not parts:
        raise InputError("No shards were given: name the files that `profile --shard` wrote.")
    merged = merge_states([read_state(p) for p in parts], [str(p) for p in parts])
    profile = finish(merged, "The merged profile")
    write_state(merged, out)
    return profile


def load_profile(path: Path) -> Profile:
    """Read a complete profile."""
    from cacheplan.profilers.store import finish, read_state

    return finish(read_state(path), str(path))


@overload
def solve(
    profile: KVProfile,
    *,
    budget: str | float,
    recipe: str = ...,
    solver: str | None = ...,
    length: int | None = ...,
    decode_every: int | None = ...,
    command: str = ...,
) -> KVPlan: ...
@overload
def solve(
    profile: FeatureProfile,
    *,
    budget: str | float,
    recipe: str = ...,
    solver: str | None = ...,
    length: int | None = ...,
    decode_every: int | None = ...,
    command: str = ...,
) -> FeaturePlan: ...
def solve(
    profile: Profile,
    *,
    budget: str | float,
    recipe: str = "planned",
    solver: str | None = None,
    length: int | None = None,
    decode_every: int | None = None,
    command: str = "",
) -> Plan:
    """Choose what every site keeps, or every step computes, under the budget.

    Only for language models: `length` is the prompt length for which absolute budgets ("512tok",
    "2GiB") are translated, the profile's mean context length if None; `solver` applies to the
    knapsack of `planned` ("milp" if None); `decode_every` new tokens caches are cut back.
    """
    if isinstance(profile, KVProfile):
        return language.solve_language(
            profile,
            budget=budget,
            recipe=recipe,
            solver=solver,
            length=length,
            decode_every=decode_every,
            command=command,
        )
    _only("language", solver=solver, length=length, decode_every=decode_every)
    return diffusion.solve_features(profile, budget=budget, recipe=recipe, command=command)


def refine(
    plan: AnyPlan,
    profile: Profile,
    *,
    model: str | None = None,
    prompts: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    split: float | None = None,
    limit: int | None = None,
    evaluations: int | None = None,
    minutes: float | None = None,
    state: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> AnyPlan:
    """Improve a plan by what it really does to the model, on the profile's own prompts.

    For a KV cache, heads are weighed by their share of the damage under the plan, and the plan is
    solved again (`cache_refinement`).  For a diffusion model, computed steps are moved as long as
    the final latent comes closer to the full run's (`picture_refinement`; `settings` are those of
    the call).  At most `evaluations` (8 or 200) plans are measured on the first `limit` (16 or 8)
    prompts, and none after `minutes`.  `state` is a file that keeps what was tried; with it, an
    interrupted search goes on where it stopped.

    Raises InputError for another profile or other prompts than the plan's, UnsupportedError for
    plans that leave nothing to choose.
    """
    common: dict[str, Any] = {
        "model": model,
        "prompts": prompts,
        "limit": limit,
        "evaluations": evaluations,
        "minutes": minutes,
        "state": state,
        "device": device,
        "dtype": dtype,
        "command": command,
        "progress": progress,
    }
    if isinstance(plan, KVPlan) and isinstance(profile, KVProfile):
        _only("diffusion", settings=settings or None)
        refined: Plan = language.refine_language(plan, profile, split=split, **common)
        return cast(AnyPlan, refined)
    if isinstance(plan, FeaturePlan) and isinstance(profile, FeatureProfile):
        _only("language", split=split)
        refined = diffusion.refine_features(plan, profile, settings=settings or {}, **common)
        return cast(AnyPlan, refined)
    raise InputError(
        f"The plan is for a {plan.family} model, but the profile is of a "
        f"{profile.model.family} model: give the file that `cacheplan solve` read."
    )


@overload
def verify(
    plan: KVPlan,
    *,
    model: str | None = ...,
    prompts: Path | None = ...,
    split: float | None = ...,
    settings: Mapping[str, Any] | None = ...,
    limit: int | None = ...,
    device: str | None = ...,
    dtype: str | None = ...,
    progress: Progress | None = ...,
    placement: Placement | None = ...,
) -> Verification: ...
@overload
def verify(
    plan: FeaturePlan,
    *,
    model: str | None = ...,
    prompts: Path | None = ...,
    split: float | None = ...,
    settings: Mapping[str, Any] | None = ...,
    limit: int | None = ...,
    device: str | None = ...,
    dtype: str | None = ...,
    progress: Progress | None = ...,
    placement: Placement | None = ...,
) -> PictureVerification: ...
def verify(
    plan: Plan,
    *,
    model: str | None = None,
    prompts: Path | None = None,
    split: float | None = None,
    settings: Mapping[str, Any] | None = None,
    limit: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    placement: Placement | None = None,
) -> Verification | PictureVerification:
    """Measure the plan's damage on held-out prompts (for the embedded model: its own).

    A large language model is divided over devices by `placement`.  Raises InputError if the prompts
    are those the plan was calibrated on.
    """
    common: dict[str, Any] = {
        "model": model,
        "prompts": prompts,
        "limit": limit,
        "device": device,
        "dtype": dtype,
        "progress": progress,
    }
    if isinstance(plan, KVPlan):
        _only("diffusion", settings=settings or None)
        return language.verify_language([plan], split=split, placement=placement, **common)[0]
    _only("language", split=split, device_map=placement)
    return diffusion.verify_features([plan], settings=settings or {}, **common)[0][0]


def compare(
    plans: Sequence[Plan],
    *,
    model: str | None = None,
    prompts: Path | None = None,
    split: float | None = None,
    settings: Mapping[str, Any] | None = None,
    limit: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    placement: Placement | None = None,
) -> Comparison:
    """Measure several plans of one model on the same prompts; the arguments are those of `verify`.

    The full cache, or the full run, is made once for all of them.
    """
    if not plans:
        raise InputError("No plans were given: name files that `cacheplan solve` wrote.")
    common: dict[str, Any] = {
        "model": model,
        "prompts": prompts,
        "limit": limit,
        "device": device,
        "dtype": dtype,
        "progress": progress,
    }
    caches = [plan for plan in plans if isinstance(plan, KVPlan)]
    features = [plan for plan in plans if isinstance(plan, FeaturePlan)]
    if caches and features:
        raise InputError("Plans for language and for diffusion models cannot be compared.")
    if caches:
        _only("diffusion", settings=settings or None)
        kept = language.verify_language(caches, split=split, placement=placement, **common)
        return Comparison(tuple(kept), ())
    _only("language", split=split, device_map=placement)
    found, rows = diffusion.verify_features(features, settings=settings or {}, **common)
    return Comparison(tuple(found), tuple(rows))


def _only(family: str, **options: object) -> None:
    """InputError for options of one family of models that were given for another."""
    for name, value in options.items():
        if value is not None:
            option = "call" if name == "settings" else name.replace("_", "-")
            raise InputError(f"--{option} is for {family} models, which this is not: leave it out.")
