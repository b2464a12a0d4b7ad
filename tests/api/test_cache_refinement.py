"""Closing the loop of a cache plan: shares add up, nothing gets worse, nothing is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cacheplan import api, cache_refinement
from cacheplan.adapters.language import load
from cacheplan.cache_refinement import reweighted
from cacheplan.errors import InputError, UnsupportedError
from cacheplan.inputs import prompts_for
from cacheplan.plans.check import kv_only
from cacheplan.profilers.contextual import InContext, measure_in_context
from cacheplan.readings import sensitivities
from cacheplan.types import KVAction, KVPlan, KVProfile
from cacheplan.verification import measure_damage

PROMPTS = 3


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> KVProfile:
    found = api.profile(
        None, out=tmp_path_factory.mktemp("refine") / "p.safetensors", limit=PROMPTS, ablate=2
    )
    assert isinstance(found, KVProfile)
    return found


@pytest.fixture(scope="module")
def plan(profile: KVProfile) -> KVPlan:
    return kv_only(api.solve(profile, budget=0.3), "test")


def whole(plan: KVPlan, layer: int, head: int) -> KVPlan:
    entries = [
        replace(entry, action=replace(entry.action, keep=1.0))
        if (entry.site.layer, entry.site.head) == (layer, head)
        and isinstance(entry.action, KVAction)
        else entry
        for entry in plan.entries
    ]
    return replace(plan, entries=tuple(entries))


def test_context_is_what_the_runtime_does(plan: KVPlan) -> None:
    """KL of the plan, and of the plan with one head whole, as `verify` measures them."""
    loaded = load(None)
    prompts = prompts_for(loaded, None, "calibration", 0.8, 1)
    found = measure_in_context(loaded.model, plan, prompts)
    assert found.restored is not None
    with torch.no_grad():
        assert found.kl == pytest.approx(
            measure_damage(loaded.model, plan, prompts).damage.kl, rel=1e-2, abs=1e-7
        )
    most = np.unravel_index(found.restored.argmin(), found.restored.shape)
    assert found.restored[most] < found.kl


def test_weights_are_what_the_reweighted_profile_says(profile: KVProfile) -> None:
    before = sensitivities(profile)
    weight = np.random.default_rng(0).uniform(0.1, 2, before.shape[:2])
    np.testing.assert_allclose(
        sensitivities(reweighted(profile, weight)), weight[..., None] * before
    )


def test_shares_add_up_to_a_quadratic_divergence(profile: KVProfile, plan: KVPlan) -> None:
    """If the divergence is (sum a)^2, weights times predictions is the whole of it."""
    damage = cache_refinement._predicted(profile, plan)
    amount = np.random.default_rng(1).uniform(0.1, 1, damage.shape) * (damage > 0)
    alone = np.where(damage > 0, amount**2 / np.where(damage > 0, damage, 1), 1)
    total = amount.sum()
    found = InContext(float(total**2), (total - amount) ** 2)
    new = cache_refinement._weights(profile, plan, found, alone)
    assert (new * damage).sum() == pytest.approx(total**2)


def test_refining_never_measures_worse_and_resumes(
    profile: KVProfile, plan: KVPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "refined.json.part"
    runs: list[Any] = []
    limit = 2

    def counted(*args: Any, **kwargs: Any) -> InContext:
        if len(runs) == limit:
            raise KeyboardInterrupt
        runs.append(args)
        return measure_in_context(*args, **kwargs)

    monkeypatch.setattr(cache_refinement, "measure_in_context", counted)
    options: dict[str, Any] = {"evaluations": 4, "limit": PROMPTS, "state": state}
    with pytest.raises(KeyboardInterrupt):
        api.refine(plan, profile, **options)
    assert len(json.loads(state.read_text())["plans"]) == 2
    limit = 4
    resumed = api.refine(plan, profile, command="again", **options)
    assert not state.exists()
    assert len(runs) <= 4, "what was measured before the interruption is not measured again"
    monkeypatch.undo()
    straight = api.refine(plan, profile, command="again", **options)
    assert resumed == straight
    before, after = straight.certificate.status.split("KL ")[1].split(" -> ")
    assert float(after) <= float(before)
    assert straight.budget.reached <= 0.3 + 1e-9
    assert straight.provenance.command == "again"


def test_what_cannot_be_refined_is_refused(
    profile: KVProfile, plan: KVPlan, tmp_path: Path
) -> None:
    snapkv = api.solve(profile, budget=0.3, recipe="snapkv")
    with pytest.raises(UnsupportedError, match="does not weigh heads"):
        api.refine(snapkv, profile)
    with pytest.raises(InputError, match="not solved from this profile"):
        api.refine(plan, replace(profile, digest="sha256:0"))
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "' + "one two three four five six " * 10 + '"}\n')
    with pytest.raises(InputError, match="not the prompts of the profile"):
        api.refine(plan, profile, prompts=other)
    with pytest.raises(InputError, match="--evaluations"):
        api.refine(plan, profile, evaluations=0)
    broken = tmp_path / "broken.part"
    broken.write_text("{")
    with pytest.raises(InputError, match="remove it"):
        api.refine(plan, profile, state=broken)
