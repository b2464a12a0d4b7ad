"""From a feature profile, a recipe and a budget to what is done at every site and step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cacheplan.errors import InfeasibleError
from cacheplan.plans.compute import full_flops, saved_flops
from cacheplan.schedules.groups import Group, groups, head, model, probing, whole
from cacheplan.schedules.keys import forced_steps, problem, published
from cacheplan.schedules.linears import linear_entries
from cacheplan.schedules.planned import Serving, options, outlook, plan_steps, rates_of, serve
from cacheplan.schedules.realize import entries, keys_before, serving_entries
from cacheplan.schedules.tables import Gram, between, sensitivity, statistic
from cacheplan.schedules.thresholds import fit_gate, fit_rescale
from cacheplan.solvers.certify import relative_gap, verdict
from cacheplan.types import (
    Certificate,
    FeatureEntry,
    FeatureProfile,
    FeatureRecipe,
    FeatureSite,
    Gate,
    LinearEntry,
    Schedule,
)

Mask = NDArray[np.bool_]
_OPTIMAL = 1e-3
_SLACK = 1e-9


@dataclass(frozen=True)
class Planned:
    """What a plan needs beyond its head; `reached` is the share of FLOPs that is spent."""

    entries: tuple[FeatureEntry, ...]
    gate: Gate | None
    dt_scale: tuple[float, ...]
    certificate: Certificate
    predicted_error: float  # of full bits
    reached: float
    text_once: bool = False
    linears: tuple[LinearEntry, ...] = ()


def plan_features(profile: FeatureProfile, recipe: FeatureRecipe, kept: float) -> Planned:
    """Choose what is not computed within the share `kept` of the full FLOPs."""
    if recipe.schedule == "planned":
        once = text_once(profile, recipe)
        serving = plan_steps(profile, forced_steps(profile, recipe), kept, text_once=once)
        gap = relative_gap(serving.damage, serving.bound)
        status = verdict(gap, "the Lagrangian bound", _OPTIMAL) + _words(serving)
        proof = Certificate(
            solver="shortest path",
            value=serving.damage,
            bound=serving.bound,
            gap=gap,
            status=status,
        )
        return _served(profile, serving, proof, once)
    found = groups(profile, recipe)
    gate, solution = None, None
    if recipe.schedule == "gate":
        gate, mask, status = _gated(profile, recipe, problem(profile, recipe, found, kept))
    else:
        mask, solution, status = published(profile, recipe, found, kept)
    value = solution.value if solution else 0.0
    bound = solution.bound if solution else None
    certificate = Certificate(
        solver=recipe.schedule,
        value=value if math.isfinite(value) else 0.0,
        bound=bound,
        gap=None if bound is None else relative_gap(value, bound),
        status=status,
    )
    planned = _followed(profile, recipe, found, mask, certificate)
    if gate is None:
        return planned
    free = np.tile(forced_steps(profile, recipe), (len(found), 1))  # the gate decides the others
    return replace(planned, entries=entries(profile, recipe, found, free), gate=gate)


def plan_for(
    profile: FeatureProfile, recipe: FeatureRecipe, computed: Mask, kept: float
) -> Planned | None:
    """The plan for given computed steps `[S, T]` of the recipe's `searched` schedule.

    None where it would take more than `kept` or serve a step from farther back than was measured.
    """
    unproven = Certificate(solver="given", value=0.0, bound=None, gap=None, status="As given.")
    if recipe.schedule == "planned":
        once = text_once(profile, recipe)
        serving = serve(profile, computed[0], kept, text_once=once)
        return None if serving is None else _served(profile, serving, unproven, once)
    found = groups(profile, recipe)
    try:
        planned = _followed(profile, recipe, found, computed, unproven)
    except InfeasibleError:
        return None
    return planned if planned.reached <= kept + _SLACK else None


def searched(
    profile: FeatureProfile, recipe: FeatureRecipe, kept: float
) -> tuple[Schedule, tuple[frozenset[FeatureSite], ...]]:
    """What a search may change: the schedule with its budget, and the sites of each of its rows.

    Its costs say which changes are promising.
    """
    if recipe.schedule == "planned":
        schedule, menu = outlook(profile, forced_steps(profile, recipe)), options(profile)
        rates = rates_of(profile.model, menu, text_once=text_once(profile, recipe))
        every = frozenset(option.site for option in menu)
        rate, base = np.full(1, rates.step / rates.total), np.full(1, rates.computed(0))
        return replace(schedule, rate=rate, base=base, budget=kept), (every,)
    found = groups(profile, recipe)
    return problem(profile, recipe, found, kept), tuple(frozenset(g.sites) for g in found)


def text_once(profile: FeatureProfile, recipe: FeatureRecipe) -> bool:
    """Whether keys and values of the text are computed once: they were the same in every run."""
    found = profile.statistics.get("text_constant")  # absent in profiles of older releases
    return recipe.text_once and found is not None and float(found.mean) == 1.0


def _served(
    profile: FeatureProfile, serving: Serving, certificate: Certificate, once: bool
) -> Planned:
    return Planned(
        entries=serving_entries(profile, serving),
        gate=None,
        dt_scale=(),
        certificate=certificate,
        predicted_error=serving.damage,
        reached=serving.rate,
        text_once=once,
    )


def _words(serving: Serving) -> str:
    steps = int(serving.computed.sum())
    partial = int((serving.served > 1).sum())  # after the whole and the model come the tails
    return f" {steps} steps computed whole, {partial} in part."


def _followed(
    profile: FeatureProfile,
    recipe: FeatureRecipe,
    found: Sequence[Group],
    mask: Mask,
    certificate: Certificate,
) -> Planned:
    """A published recipe whose groups compute the steps `mask` `[S, T]`."""
    spec, made = profile.model, entries(profile, recipe, found, mask)
    saved = sum(saved_flops(spec, entry.site, entry.step) for entry in made) / full_flops(spec)
    probed = probing(spec, recipe) * int((~mask).any(0).sum())
    return Planned(
        entries=made,
        gate=None,
        dt_scale=_shortened(profile, mask[0]) if recipe.scale_steps else (),
        certificate=certificate,
        linears=linear_entries(profile, recipe),
        predicted_error=predict(profile, recipe, found, mask),
        reached=1 - saved + probed,
    )


def predict(
    profile: FeatureProfile, recipe: FeatureRecipe, found: Sequence[Group], computed: Mask
) -> float:
    """Predicted relative error of the final latent.

    As if the whole followed each group's schedule, weighted by the groups' cost: features of a
    step change together, so a schedule matters more than the site it is for.
    """
    site = model(profile) if recipe.sites == "model" else whole(profile)
    of = "output_damage" if recipe.sites == "model" else "final_damage"
    gram, weight = Gram.of(profile, site), sensitivity(profile, of=of)
    total, costs = 0.0, sum(group.cost for group in found)
    for group, row in zip(found, computed, strict=True):
        for step in np.flatnonzero(~row).tolist():
            keys = keys_before(profile.model, row, step)[: recipe.order + 1]
            if recipe.correction != "none":
                weights = gram.fitted(step, keys)
            else:
                weights = gram.weights(recipe.basis, recipe.order, step, keys)
            error = gram.error(step, keys[: len(weights)], weights)
            error = error if math.isfinite(error) else 2.0  # beyond what was compared: unrelated
            total += group.cost / costs * math.sqrt(weight[step] * error)
    return total


def _gated(
    profile: FeatureProfile, recipe: FeatureRecipe, schedule: Schedule
) -> tuple[Gate, Mask, str]:
    assert recipe.gate is not None
    gate = replace(recipe.gate, blocks=head(profile, recipe.gate.blocks))
    if gate.signal == "modulation":
        gate = replace(gate, rescale=fit_rescale(profile))
    fitted = fit_gate(profile, gate, schedule)
    words = f"Threshold {fitted.threshold:.4g}, expected to spend the budget on average."
    return replace(gate, threshold=max(fitted.threshold, 0.0)), fitted.computed, words


def _shortened(profile: FeatureProfile, computed: Mask) -> tuple[float, ...]:
    """ERTACache's multipliers of the sampler's steps (arXiv 2508.21091, section 3.3).

    `phi_i = clip(1 - |v_j - v_i| / |v_i - v_{i+1}|, 0, 1)` at a step i served from j; what that
    leaves of the increments is spread over the steps that follow.  The last step stays as it is.
    """
    T = len(computed)
    output = between(statistic(profile, "output_l1"))
    multipliers, covered, last = [], 0.0, 0
    for step in range(T):
        current = (T - covered) / (T - step)
        if computed[step]:
            last, phi = step, 1.0
        else:
            following = output[step, step + 1] if step + 1 < T else math.inf
            phi = float(np.clip(1 - output[last, step] / max(following, 1e-12), 0, 1))
        multipliers.append(round(current * phi, 9))
        covered += current * phi
    return (*(min(m, 4.0) for m in multipliers[:-1]), 1.0)
