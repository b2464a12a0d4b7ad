"""Which sites a recipe caches, and which of them follow one schedule."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cacheplan.errors import UnsupportedError
from cacheplan.plans.compute import expert_ranges, halves, saved_flops
from cacheplan.types import DiffusionSpec, FeatureProfile, FeatureRecipe, FeatureSite

_PROBING = 4  # at most a quarter of the blocks probe


@dataclass(frozen=True)
class Group:
    """Sites with one schedule; `cost` is the share of all FLOPs that leaving them out once saves.

    Of a model whose denoisers take turns, a group holds sites of each: those of one run at a time.
    `turns` are the steps at which each site may be left out, where that is not all of them.
    """

    sites: tuple[FeatureSite, ...]
    cost: float
    turns: tuple[range, ...] = ()

    def at(self, spec: DiffusionSpec, step: int) -> list[FeatureSite]:
        """The sites that are left out when the step is not computed."""
        turns = self.turns or (range(spec.steps),) * len(self.sites)
        pairs = zip(self.sites, turns, strict=True)
        return [site for site, turn in pairs if step in turn and runs(spec, site, step)]


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
    if site.part in ("hidden", "model") or not spec.expert_starts:
        return True
    running = sum(begin <= step for begin in spec.expert_starts)
    found = expert_ranges(spec)
    blocks = found[min(running, len(found) - 1)]
    return blocks.start <= site.first and site.last <= blocks.stop


def groups(profile: FeatureProfile, recipe: FeatureRecipe) -> list[Group]:
    """The recipe's sites; UnsupportedError where the model has none of the kind."""
    spec, end = profile.model, len(profile.model.blocks)
    turns: tuple[range, ...] = ()
    single = {
        "whole": whole(profile),
        "branch": FeatureSite(part="branch", first=1, last=end - 1),
        "model": model(profile),
        "stack": FeatureSite(part="delta", first=0, last=end),
        "tail": FeatureSite(part="delta", first=head(profile, recipe.head), last=end),
    }
    if recipe.sites in single:
        chosen: list[tuple[FeatureSite, ...]] = [(single[recipe.sites],)]
    elif recipe.sites == "halves":
        pairs = [half for blocks in expert_ranges(spec) for half in halves(blocks)]
        chosen, half = [tuple(pairs)], spec.steps // 2
        turns = (range(half, spec.steps), range(half)) * (len(pairs) // 2)
    else:
        deltas, named = recipe.sites == "blocks", dict(recipe.ranges)
        fine = [s for s in profile.sites if _fine(s, deltas=deltas)]
        chosen = _shared([s for s in fine if not named or s.part in named], recipe.share)
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
    found = [Group(sites, 0.0, turns) for sites in chosen]
    probed = probing(spec, recipe)
    return [replace(group, cost=_saved(spec, group) - probed) for group in found]


def probing(spec: DiffusionSpec, recipe: FeatureRecipe) -> float:
    """The share of all FLOPs that a gate computes at a step it skips, beyond what is kept fresh.

    It looks at the first blocks in the first of a step's calls.
    """
    gate = recipe.gate
    if gate is None or gate.signal == "secant" or recipe.sites not in ("whole", "stack"):
        return 0.0
    probed = sum(block.cost for block in spec.blocks[: gate.blocks])
    return probed / (len(spec.branches) * spec.steps * spec.cost)


def _saved(spec: DiffusionSpec, group: Group) -> float:
    """The share of all FLOPs that one step less saves, at the step where that is least."""
    saved = (
        sum(saved_flops(spec, site, step) for site in group.at(spec, step))
        for step in range(spec.steps)
    )
    return min(saved) / (spec.steps * spec.cost)


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
