"""Which sites a recipe caches, and which of them follow one schedule."""

from __future__ import annotations

from dataclasses import dataclass

from cacheplan.errors import UnsupportedError
from cacheplan.plans.compute import experts, saved_flops
from cacheplan.types import DiffusionSpec, FeatureProfile, FeatureRecipe, FeatureSite

_PROBING = 4  # at most a quarter of the blocks probe


@dataclass(frozen=True)
class Group:
    """Sites with one schedule; `cost` is the share of all FLOPs that computing them once takes.

    Of a model whose denoisers take turns, a group holds sites of each: those of one run at a time.
    """

    sites: tuple[FeatureSite, ...]
    cost: float


def whole(profile: FeatureProfile) -> FeatureSite:
    """The coarsest site after which the denoiser's end is fresh."""
    return next(site for site in profile.sites if site.part in ("hidden", "branch"))


def model(profile: FeatureProfile) -> FeatureSite:
    return next(site for site in profile.sites if site.part == "model")


def head(profile: FeatureProfile, blocks: int) -> int:
    """How many first blocks probe; papers' numbers are for models of some fifty blocks.

    At most as many, since not every tail of a deep model is measured.
    """
    end = len(profile.model.blocks)
    most = max(1, min(blocks, end // _PROBING))
    tails = [s.first for s in profile.sites if s.part == "delta" and s.last == end]
    return max((first for first in tails if 1 <= first <= most), default=most)


def runs(spec: DiffusionSpec, site: FeatureSite, step: int) -> bool:
    """Whether the site is in the denoiser that runs at the step."""
    if site.part in ("hidden", "model"):
        return True
    running, start = sum(begin <= step for begin in spec.expert_starts), 0
    for index, blocks in enumerate(experts(spec)):
        if index == running:
            return start <= site.first and site.last <= start + len(blocks)
        start += len(blocks)
    return False


def groups(profile: FeatureProfile, recipe: FeatureRecipe) -> list[Group]:
    """The recipe's sites; UnsupportedError where the model has none of the kind."""
    spec, end = profile.model, len(profile.model.blocks)
    single = {
        "whole": whole(profile),
        "model": model(profile),
        "stack": FeatureSite(part="delta", first=0, last=end),
        "tail": FeatureSite(part="delta", first=head(profile, recipe.head), last=end),
    }
    if recipe.sites in single:
        chosen: list[tuple[FeatureSite, ...]] = [(single[recipe.sites],)]
    else:
        deltas = recipe.sites == "blocks"
        found = [s for s in profile.sites if _fine(s, deltas=deltas)]
        chosen = _shared(found, recipe.share)
    for sites in chosen:
        for site in sites:
            if site not in profile.sites:
                raise UnsupportedError(
                    f'The recipe "{recipe.name}" caches {site.part} of blocks {site.first} to '
                    f"{site.last - 1}, which {spec.architecture} has no measurement of: choose a "
                    'recipe for the whole model, such as "planned".'
                )
    if not chosen:
        raise UnsupportedError(
            f'The recipe "{recipe.name}" caches {recipe.sites}, which {spec.architecture} does '
            'not have: choose a recipe for the whole model, such as "planned".'
        )
    if spec.expert_starts and len(chosen[0]) == 1 and chosen[0][0].part not in ("hidden", "model"):
        raise UnsupportedError(
            f'The recipe "{recipe.name}" gives every site its own steps, but the denoisers of '
            f'{spec.pipeline} take turns: choose a recipe for the whole model, such as "planned".'
        )
    return [Group(sites, _cost(spec, sites)) for sites in chosen]


def _cost(spec: DiffusionSpec, sites: tuple[FeatureSite, ...]) -> float:
    """The share of all FLOPs that computing the sites takes at one step, mean over steps."""
    saved = sum(
        saved_flops(spec, site, step)
        for step in range(spec.steps)
        for site in sites
        if runs(spec, site, step)
    )
    return saved / (spec.steps * spec.steps * spec.cost)


def _fine(site: FeatureSite, *, deltas: bool) -> bool:
    coarse = site.part in ("delta", "hidden", "branch", "model")
    return (site.part == "delta" and site.last == site.first + 1) if deltas else not coarse


def _shared(sites: list[FeatureSite], share: str) -> list[tuple[FeatureSite, ...]]:
    if not sites:
        return []
    if share == "all":
        return [tuple(sites)]
    if share == "site":
        return [(site,) for site in sites]
    kinds = dict.fromkeys(site.part for site in sites)
    return [tuple(site for site in sites if site.part == kind) for kind in kinds]
