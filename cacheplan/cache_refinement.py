"""Close the loop of a cache plan: measure heads under the plan, weigh them anew, solve again.

Sensitivities are first measured with one head cut back and all others whole.  Under a plan all
heads are cut back at once and errors meet, so a head's share of the damage is another.  If the
logits move by the sum of what each head does, a_h, the divergence is quadratic, and with head h
kept whole it falls by m_h = a_h^2 + 2 a_h sum_{g != h} a_g.  Half of the mixed terms are h's, so
its share is (m_h + a_h^2) / 2, and the shares of all heads add up to the divergence (they are the
Shapley values of this game, Shapley 1953).  A head's weight is its share over what was predicted of
it alone, by which its sensitivities are multiplied.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacheplan.atomic import atomic_write
from cacheplan.errors import InputError
from cacheplan.plans.codec import encode
from cacheplan.profilers.contextual import InContext, measure_in_context
from cacheplan.profilers.prompts import Prompt, digest
from cacheplan.readings import candidate_index, sensitivities, statistic
from cacheplan.types import Entry, KVAction, KVPlan, KVProfile, Statistic

Floats = NDArray[np.float64]
Solve = Callable[[KVProfile], KVPlan]
Progress = Callable[[int, int, str], None]

LEAST = 0.05  # a head's weight falls at most to this part of what it was: shares can be negative
WORTH = 0.005  # a plan must measure better by this share to count as one


def refine_cache_plan(
    model: Any,
    plan: KVPlan,
    profile: KVProfile,
    prompts: Sequence[Prompt],
    solve: Solve,
    *,
    evaluations: int,
    minutes: float | None = None,
    state: Path | None = None,
    progress: Progress | None = None,
) -> tuple[KVPlan, float, float]:
    """The best of at most `evaluations` plans, with the KL of the given one and of the best.

    Where a plan solved with the new weights measures no better, the weights go back half of the
    way (in logarithms) to those of the best plan so far, and it is tried again.  The plan returned
    is never worse than the given one on these prompts.  No measurement begins after `minutes`;
    `state` is a file that keeps what was measured, so an interrupted run goes on from it, and is
    removed at the end.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    measured = _Measured(model, profile, prompts, state)
    best = measured.of(plan)
    first, best_plan = best.kl, plan
    weight = np.ones((len(plan.model.planned), plan.model.kv_heads))
    target = _weights(profile, best_plan, best, weight)
    for number in range(1, evaluations):
        if progress:
            progress(number, evaluations, f"KL {first:.3g} -> {best.kl:.3g}")
        found = solve(reweighted(profile, target))
        if found.entries == best_plan.entries or time.monotonic() > deadline:
            break
        tried = measured.of(found)
        if tried.kl < (1 - WORTH) * best.kl:
            best, best_plan, weight = tried, found, target
            target = _weights(profile, best_plan, best, weight)
        else:
            target = np.sqrt(target * weight)
    if progress:
        progress(evaluations, evaluations, f"KL {first:.3g} -> {best.kl:.3g}")
    if state is not None and time.monotonic() <= deadline:
        state.unlink(missing_ok=True)
    return best_plan, first, best.kl


class _Measured:
    """Plans and what they measured, also in an earlier, interrupted run."""

    def __init__(
        self, model: Any, profile: KVProfile, prompts: Sequence[Prompt], state: Path | None
    ) -> None:
        self.model, self.prompts, self.state = model, prompts, state
        self.origin = {"profile": profile.digest, "prompts": digest(prompts)}
        self.known: dict[str, dict[str, Any]] = {}
        if state is not None and state.exists():
            self.known = self._read(state)

    def of(self, plan: KVPlan) -> InContext:
        entries = json.dumps(encode(tuple[Entry, ...], plan.entries), sort_keys=True)
        key = hashlib.sha256(entries.encode()).hexdigest()
        if key not in self.known:
            found = measure_in_context(self.model, plan, self.prompts)
            assert found.restored is not None
            self.known[key] = {"kl": found.kl, "restored": found.restored.tolist()}
            if self.state is not None:
                content = {**self.origin, "plans": self.known}
                atomic_write(self.state, json.dumps(content).encode())
        return InContext(self.known[key]["kl"], np.array(self.known[key]["restored"]))

    def _read(self, state: Path) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(state.read_text())
            plans: dict[str, dict[str, Any]] = content["plans"]
            origin = {name: content[name] for name in self.origin}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{state} is not of an unfinished refinement: remove it.") from error
        if origin != self.origin:
            raise InputError(
                f"{state} belongs to another profile or other prompts: remove it to start anew."
            )
        return plans


def reweighted(profile: KVProfile, weight: Floats) -> KVProfile:
    """A profile whose sensitivities are `weight` `[L, K]` times what they were."""
    divergence = profile.statistics["ablation_kl"]
    kl = divergence.mean * weight[:, :, None]
    changed = Statistic(divergence.axes, divergence.count, kl, np.zeros_like(kl))
    return replace(profile, statistics={**profile.statistics, "ablation_kl": changed})


def _weights(profile: KVProfile, plan: KVPlan, found: InContext, weight: Floats) -> Floats:
    """Each head's share of the divergence under the plan, over what the profile predicts."""
    assert found.restored is not None
    predicted = _predicted(profile, plan)
    alone = weight * predicted
    share = (found.kl - found.restored + alone) / 2
    cut = alone > 0
    new = np.where(cut, share / np.where(cut, predicted, 1), weight)
    return np.maximum(new, LEAST * weight)


def _predicted(profile: KVProfile, plan: KVPlan) -> Floats:
    """The KL that the profile predicts of each head's choice alone, `[L, K]`."""
    damage = sensitivities(profile)[..., None] * statistic(profile, "damage")
    found = np.zeros(damage.shape[:2])
    for entry in plan.entries:
        action, head = entry.action, entry.site.head
        assert isinstance(action, KVAction)
        assert head is not None
        layer = plan.model.planned.index(entry.site.layer)
        curve = damage[layer, head, candidate_index(profile, action)]
        found[layer, head] = np.interp(action.keep, profile.keeps, curve)
    return found
