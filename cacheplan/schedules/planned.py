"""The planner: computed steps and what serves each of the others, under an exact budget.

A step that is not computed is served by one of several sites, each forecast from the last two
computed steps with least squares weights: the whole model (free), the last hidden state (the
denoiser's ends stay fresh), or the tail of the blocks (the first blocks are computed: a partial
step).  The damage of a choice is how far the final latent moves: the square root of the site's
error times the sensitivity at that step.  Damages add up, since errors of one schedule point the
same way; adding their squares predicts too little.

With a multiplier m for the budget the choice of a step is `min_o damage_o + m * rate_o`, and the
computed steps are a shortest path over pairs of keys.  The best m for each number of computed
steps gives a bound that no schedule can beat; the schedules on the way are filled up to the budget
by a knapsack and improved by moving single steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cacheplan.errors import InfeasibleError
from cacheplan.plans.compute import (
    expert_ranges,
    first_steps,
    full_flops,
    saved_flops,
    step_flops,
)
from cacheplan.schedules.groups import model, runs, whole
from cacheplan.schedules.tables import RIDGE, Gram, sensitivity, site_index, statistic
from cacheplan.solvers.paths import Curves
from cacheplan.solvers.registry import knapsack_solver
from cacheplan.solvers.segments import forecast_costs, hold_costs
from cacheplan.solvers.shortest_path import curve
from cacheplan.types import DiffusionSpec, FeatureProfile, FeatureSite, Knapsack, Schedule

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Filled = tuple[NDArray[np.int64], float, float]  # served, damage, rate
_ROUNDS = 40  # halvings of the multiplier's logarithm
# of the damage predicted for forecasts of the model's own delta, where the latent drifts: they are
# added to the drifted latent, so they answer to it as the model does, and others do not.  Measured
# on two trained pipelines at a third to four tenths of the computation
_ANSWERING = 0.5
_NEAR = 2  # numbers of computed steps tried on either side of the relaxed one
_AROUND = np.logspace(-1.5, 1.5, 31).tolist()
_SLACK = 1e-9


@dataclass(frozen=True, eq=False)
class Option:
    """One way to serve a step: its rate, and its damage by keys.

    `single` `[T, T]` is the damage at step t from the one key j, `pair` `[T, T, T]` from keys
    i < j; `inf` where it cannot be.
    """

    site: FeatureSite
    rate: float
    single: Floats
    pair: Floats


@dataclass(frozen=True, eq=False)
class Rates:
    """Shares of all FLOPs: of computed steps, and `options` `[O]` of one step served by each.

    `once` is what the first step of each denoiser takes beyond what other computed steps do, in
    FLOPs, as are `step` and `total`; so that shares are rounded once.
    """

    once: int
    step: int
    total: int
    options: Floats

    def computed(self, steps: int) -> float:
        """The share of so many computed steps."""
        return (self.once + steps * self.step) / self.total


@dataclass(frozen=True, eq=False)
class Serving:
    """`computed` `[T]`, the option that serves each other step (-1 at computed ones), and proof."""

    options: tuple[Option, ...]
    computed: Mask
    served: NDArray[np.int64]
    damage: float
    rate: float
    bound: float
    ridge: float = RIDGE


def options(
    profile: FeatureProfile, ridge: float = RIDGE, *, text_once: bool = False
) -> tuple[Option, ...]:
    """The sites that may serve a step, with their damage to the final latent.

    A `ridge` above `RIDGE` says that the latent drifts (`plan_steps`).  `text_once` is the plan's.
    """
    spec = profile.model
    power, weight = statistic(profile, "power"), sensitivity(profile)
    of_output = sensitivity(profile, of="output_damage")
    found = []
    for site in (whole(profile), model(profile), *tails(profile)):
        gram = Gram.of(profile, site, ridge)
        share = power[site_index(profile, site)]
        scale = of_output if site.part == "model" else weight * share
        if site.part == "model" and ridge > RIDGE:
            scale = scale * _ANSWERING**2
        absent = [step for step in range(spec.steps) if not runs(spec, site, step)]
        single, pair = scale * gram.hold(), scale * gram.forecast("fitted", 1)
        single[:, absent], pair[:, :, absent] = np.inf, np.inf
        rate = _dearest(spec, text_once, site) / full_flops(spec)
        found.append(Option(site, rate, np.sqrt(single), np.sqrt(pair)))
    return tuple(found)


def rates_of(spec: DiffusionSpec, menu: tuple[Option, ...], *, text_once: bool) -> Rates:
    """What computed steps and the options of `menu` take."""
    step = _dearest(spec, text_once)
    once = len(first_steps(spec)) * (spec.cost - step)
    return Rates(once, step, full_flops(spec), np.array([option.rate for option in menu]))


def _dearest(spec: DiffusionSpec, text_once: bool, site: FeatureSite | None = None) -> int:
    """FLOPs of a step that is not the first of its denoiser, where those are most.

    It is computed whole, or but for `site`.
    """
    found = [
        step_flops(spec, step, text_once=text_once)
        - (saved_flops(spec, site, step, text_once=text_once) if site else 0)
        for step in range(spec.steps)
        if step not in first_steps(spec) and (site is None or runs(spec, site, step))
    ]
    return max(found, default=spec.cost)


def tails(profile: FeatureProfile) -> list[FeatureSite]:
    """The deltas from a block that is not a denoiser's first to its last."""
    return [
        site
        for blocks in expert_ranges(profile.model)
        for site in profile.sites
        if site.part == "delta" and site.last == blocks.stop and site.first > blocks.start
    ]


def plan_steps(
    profile: FeatureProfile, forced: Mask, kept: float, *, text_once: bool = False
) -> Serving:
    """The best schedule found within `kept` of all computation; raises InfeasibleError.

    Weights are fitted to features of full runs, but in a planned run these have drifted: by about
    the error of the final latent.  Noise of that size in the keys is the ridge of the fit (least
    squares with errors in the variables), so a plan with much damage is made again with it.
    """
    found = plan_at(profile, forced, kept, RIDGE, text_once=text_once)
    drift = min(found.damage, 1.0) ** 2
    if drift <= RIDGE:
        return found
    return plan_at(profile, forced, kept, drift, text_once=text_once)


def serve(
    profile: FeatureProfile, computed: Mask, kept: float, *, text_once: bool = False
) -> Serving | None:
    """The steps `computed` `[T]` and the best of the other steps within `kept`; None if none fits.

    Fitted as in `plan_steps`.
    """
    found = _serve(profile, computed, kept, RIDGE, text_once)
    if found is None or (drift := min(found.damage, 1.0) ** 2) <= RIDGE:
        return found
    return _serve(profile, computed, kept, drift, text_once)


def _serve(
    profile: FeatureProfile, computed: Mask, kept: float, ridge: float, text_once: bool
) -> Serving | None:
    menu = options(profile, ridge, text_once=text_once)
    rates = rates_of(profile.model, menu, text_once=text_once)
    filled = _fill(*_tables(menu), rates, computed, kept)
    return None if filled is None else Serving(menu, computed, *filled, 0.0, ridge)


def outlook(profile: FeatureProfile, forced: Mask) -> Schedule:
    """Schedules judged as if the whole model's forecast served all steps that are not computed."""
    option = options(profile)[0]
    return _problem(option.single, option.pair, forced)


def _tables(menu: tuple[Option, ...]) -> tuple[Floats, Floats]:
    """Damage from one key and from two of all options."""
    single, pair = ([getattr(option, name) for option in menu] for name in ("single", "pair"))
    return np.stack(single), np.stack(pair)


def plan_at(
    profile: FeatureProfile, forced: Mask, kept: float, ridge: float, *, text_once: bool = False
) -> Serving:
    """The best schedule found for forecasts fitted with this ridge."""
    menu = options(profile, ridge, text_once=text_once)
    T, rates = profile.model.steps, rates_of(profile.model, menu, text_once=text_once)
    single, pair = _tables(menu)
    fewest = int(np.flatnonzero(np.isfinite(_curve(single, pair, forced).distortion[0]))[0])
    least = rates.computed(fewest) + (T - fewest) * rates.options.min()
    if kept < least - _SLACK:
        raise InfeasibleError(
            f"The budget {kept:.3g} is too small, since at least {fewest} of {T} steps are "
            f"computed: the smallest feasible budget is {math.ceil(1000 * least) / 1000:g}."
        )
    tried: dict[bytes, Mask] = {}
    bounds = np.zeros(T + 1)  # of schedules with so many computed steps
    spent = np.array([rates.computed(steps) for steps in range(T + 1)])

    def relaxed(multiplier: float) -> float:
        """The rate of the cheapest priced schedule; notes it, its neighbours and the bound."""
        price = multiplier * rates.options
        found = _curve(single + price[:, None, None], pair + price[:, None, None, None], forced)
        priced = found.distortion[0] + multiplier * spent
        best = int(priced.argmin())
        np.maximum(bounds, priced - multiplier * kept, out=bounds)
        for keys in range(max(1, best - _NEAR), min(T, best + _NEAR) + 1):
            mask = found.computed[0, keys]
            if np.isfinite(found.distortion[0, keys]) and spent[keys] <= kept + _SLACK:
                tried[mask.tobytes()] = mask
        return _cheapest(single, pair, rates, found.computed[0, best], multiplier)

    low, high = 1e-12, 1e6
    for _ in range(_ROUNDS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if relaxed(middle) > kept else (low, middle)
    for factor in _AROUND:  # each number of computed steps has its own best multiplier
        relaxed(high * factor)
    best: Serving | None = None
    for mask in tried.values():
        served = _fill(single, pair, rates, mask, kept)
        if served is not None and (best is None or served[1] < best.damage):
            best = Serving(menu, mask, *served, 0.0)
    if best is None:
        raise InfeasibleError(f"No schedule was found within the budget {kept:.3g}: raise it.")
    best = _moved(best, forced, lambda mask: _fill(single, pair, rates, mask, kept))
    return replace(best, bound=min(float(bounds.min()), best.damage), ridge=ridge)


def _curve(single: Floats, pair: Floats, forced: Mask) -> Curves:
    """The least damage for every number of computed steps, if each other step costs its best."""
    return curve(_problem(single.min(0), pair.min(0), forced))


def _problem(single: Floats, pair: Floats, forced: Mask) -> Schedule:
    return Schedule(
        rate=np.ones(1),
        base=np.zeros(1),
        hold=hold_costs(single)[None],
        forecast=forecast_costs(pair)[None],
        forced=forced[None],
        budget=math.inf,
    )


def _moved(best: Serving, forced: Mask, fill: Callable[[Mask], Filled | None]) -> Serving:
    """Move, drop or add one computed step at a time as long as that helps.

    Whole steps and the budget left over by them do not fit together smoothly, which the
    multiplier does not see.
    """
    known = {best.computed.tobytes()}
    improving = True
    while improving:
        improving = False
        for mask in _neighbours(best.computed, forced):
            if mask.tobytes() in known:
                continue
            known.add(mask.tobytes())
            found = fill(mask)
            if found is not None and found[1] < best.damage * (1 - 1e-9):
                best = Serving(best.options, mask, *found, 0.0)
                improving = True
    return best


def _neighbours(computed: Mask, forced: Mask) -> Iterator[Mask]:
    for step in np.flatnonzero(~forced).tolist():
        changed = computed.copy()
        changed[step] = not changed[step]
        yield changed
        if not computed[step]:
            continue
        for other in (step - 2, step - 1, step + 1, step + 2):
            if 0 < other < len(computed) and not computed[other]:
                moved = changed.copy()
                moved[other] = True
                yield moved


def damages(single: Floats, pair: Floats, computed: Mask) -> Floats:
    """`[steps not computed, options]`: damage of each option, given the computed steps."""
    rows, keys = [], list[int]()
    for step, fresh in enumerate(computed):
        if fresh:
            keys.append(step)
        elif len(keys) == 1:
            rows.append(single[:, keys[0], step])
        else:
            rows.append(pair[:, keys[-2], keys[-1], step])
    return np.stack(rows) if rows else np.zeros((0, len(single)))


def _cheapest(
    single: Floats, pair: Floats, rates: Rates, computed: Mask, multiplier: float
) -> float:
    table = damages(single, pair, computed)
    chosen = (table + multiplier * rates.options).argmin(1)
    return rates.computed(int(computed.sum())) + float(rates.options[chosen].sum())


def _fill(single: Floats, pair: Floats, rates: Rates, computed: Mask, kept: float) -> Filled | None:
    """Options of the other steps that spend the rest of the budget best; None if none fits."""
    spent = rates.computed(int(computed.sum()))
    table = damages(single, pair, computed)
    served, rest = np.full(len(computed), -1), kept - spent
    if len(table) * rates.options.min() > rest + _SLACK or not np.isfinite(table).any(1).all():
        return None
    if not len(table):
        return served, 0.0, spent
    knapsack = Knapsack(np.tile(rates.options, (len(table), 1)), table, rest + _SLACK)
    solution = knapsack_solver("lagrangian")(knapsack)
    served[~computed] = solution.choice
    return served, solution.value, spent + solution.rate
