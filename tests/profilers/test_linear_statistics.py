"""Ranges and moments of linear layers, from the profile to plans in few bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cacheplan.adapters.denoiser import observe, split
from cacheplan.adapters.loop import denoisers
from cacheplan.adapters.sampling import run_pipeline
from cacheplan.diffusion import solve_features
from cacheplan.kernels.fake_quantize.naive import on_grid, weights_on_grid
from cacheplan.profilers.feature_ablation import whole_site
from cacheplan.profilers.feature_collect import collect_features, feature_sites
from cacheplan.profilers.feature_prompts import digest, picture_prompt
from cacheplan.profilers.settings import FeatureSettings
from cacheplan.profilers.store import ProfileState, dumps, finish, merge, read_state, write_state
from cacheplan.runtime.features.apply import apply_features
from cacheplan.types import RANGE_UNIT, FeatureProfile

PROMPTS = [picture_prompt({}, 1), picture_prompt({}, 2)]


@dataclass(frozen=True, eq=False)
class Bench:
    pipe: Any
    call: dict[str, Any]
    settings: FeatureSettings
    profile: FeatureProfile
    data: bytes

    def collect(self, state: ProfileState, save: Any = lambda state: None) -> ProfileState:
        seen = observe(self.pipe, self.call)
        collect_features(self.pipe, seen, self.call, PROMPTS, state, save=save)
        return state


@pytest.fixture(scope="module")
def get_bench(tiny_pipeline: Any) -> Callable[[str], Bench]:
    known: dict[str, Bench] = {}

    def get(name: str) -> Bench:
        if name not in known:
            pipe, call = tiny_pipeline(name)
            seen = observe(pipe, call)
            settings = FeatureSettings(
                model=seen.spec,
                sites=feature_sites(seen)[-3:],
                lags=5,
                tokens=64,
                probes=(whole_site(seen.spec),),
                ablate=1,
                prompts=2,
                prompts_digest=digest(PROMPTS),
                seed=0,
                versions=(),
                linears=seen.linears,
                readers=seen.readers,
            )
            state = ProfileState(settings, range(2))
            collect_features(pipe, seen, call, PROMPTS, state, save=lambda state: None)
            profile = finish(state, "profile")
            assert isinstance(profile, FeatureProfile)
            known[name] = Bench(pipe, call, settings, profile, dumps(state))
        return known[name]

    return get


def recorded(bench: Bench, path: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    """What a layer is given and returns, call by call, by an ordinary hook."""
    name, own = split(bench.pipe, path)
    found: list[tuple[Tensor, Tensor]] = []
    layer = denoisers(bench.pipe)[name].get_submodule(own)
    handle = layer.register_forward_hook(lambda _, args, output: found.append((args[0], output)))
    try:
        run_pipeline(bench.pipe, bench.call, seed=seed)
    finally:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["pixart", "wan", "dit", "wan_experts"])
def test_ranges_are_those_of_ordinary_hooks(get_bench: Any, name: str) -> None:
    bench = get_bench(name)
    table = bench.profile.statistics["activation_range"].mean * RANGE_UNIT
    paths = bench.profile.linears
    assert len(set(paths)) == len(paths) == len(table)
    steps = bench.profile.model.steps
    for path in (paths[0], paths[len(paths) // 2], paths[-1]):
        ends = []
        for prompt in PROMPTS:
            calls = recorded(bench, path, prompt.seed)
            mine = table[paths.index(path)].any(1).sum()  # an expert's layers run at some steps
            assert mine == steps or bench.profile.model.expert_starts
            each = len(calls) // mine
            found = [
                [min(0.0, *(float(x.min()) for x, _ in step)), max(float(x.max()) for x, _ in step)]
                for step in (calls[i : i + each] for i in range(0, len(calls), each))
            ]
            ends.append(found)
        own = table[paths.index(path)]
        np.testing.assert_allclose(own[own.any(1)], np.mean(ends, axis=0), rtol=1e-5)


def test_moments_are_those_of_the_layer_in_few_bits(get_bench: Any) -> None:
    bench = get_bench("pixart")
    ((path, channels),) = bench.profile.readers
    layer = bench.pipe.transformer.get_submodule(path)
    weight = weights_on_grid(layer.weight.detach(), 8)
    expected = np.zeros((2, channels, 6, 4))
    for own, prompt in zip(expected, PROMPTS, strict=True):
        for step, (x, y) in enumerate(recorded(bench, path, prompt.seed)):
            coarse = on_grid(x, x.min().clamp(max=0), x.max().clamp(min=0), 8)
            q = (coarse @ weight.T + layer.bias).detach().double().flatten(0, -2).numpy()
            e = y.detach().double().flatten(0, -2).numpy() - q
            own[:, step] = np.stack([v.mean(0) for v in (e, q, e * q, q * q)], axis=1)
    unit = np.array([RANGE_UNIT, RANGE_UNIT, RANGE_UNIT**2, RANGE_UNIT**2])
    found = bench.profile.statistics["reader_moments"].mean * unit
    np.testing.assert_allclose(found, expected.mean(0), atol=1e-5)
    assert (found[..., 3] > 0).all()


def test_interrupted_and_divided_profiles_have_the_same_bytes(
    get_bench: Any, tmp_path: Path
) -> None:
    bench, path = get_bench("pixart"), tmp_path / "profile.part"
    first = bench.collect(ProfileState(bench.settings, range(1)))
    write_state(first, path)
    resumed = read_state(path)
    assert resumed.done == {0}
    assert dumps(bench.collect(resumed)) == bench.data
    other = bench.collect(ProfileState(bench.settings, range(1, 2)))
    for order in ([first, other], [other, first]):
        assert dumps(merge(order, ["a", "b"])) == bench.data
    write_state(merge([other, first], ["b", "a"]), path)
    again = finish(read_state(path), "profile")
    assert isinstance(again, FeatureProfile)
    assert again.linears == bench.profile.linears
    assert again.readers == bench.profile.readers


def test_unets_have_no_linear_statistics(get_bench: Any) -> None:
    profile = get_bench("stable_diffusion").profile
    assert profile.linears == profile.readers == ()
    assert "activation_range" not in profile.statistics


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_fewer_bits_cost_more(get_bench: Any, name: str) -> None:
    """All layers with the ranges of the profile, and nothing else of the plan."""
    bench = get_bench(name)
    full = run_pipeline(bench.pipe, bench.call, seed=1).latent
    errors = []
    for recipe in ("cachequant_w8a8", "cachequant_w4a8"):
        plan = solve_features(bench.profile, budget=1.0, recipe=recipe, command="")
        assert len(plan.linears) == len(bench.profile.linears)
        assert plan.predicted is None
        with apply_features(bench.pipe, replace(plan, entries=())):
            found = run_pipeline(bench.pipe, bench.call, seed=1).latent
        errors.append(float((found - full).norm() / full.norm()))
    assert 0 < errors[0] < (0.05 if name == "pixart" else 0.25)  # random weights of DiT amplify
    assert errors[0] < 0.7 * errors[1]


def test_the_correction_of_outputs_helps_on_calibration(get_bench: Any) -> None:
    """Mean squared error of the last layer's channels, summed over steps and prompts."""
    bench = get_bench("pixart")
    plan = solve_features(bench.profile, budget=1.0, recipe="cachequant_w4a8", command="")
    entry = plan.linears[-1]
    layer = bench.pipe.transformer.get_submodule(entry.path)
    weight = weights_on_grid(layer.weight.detach(), 8)
    raw = corrected = torch.zeros(())
    for prompt in PROMPTS:
        for step, (x, y) in enumerate(recorded(bench, entry.path, prompt.seed)):
            q = on_grid(x, x.min().clamp(max=0), x.max().clamp(min=0), 8) @ weight.T + layer.bias
            a, b = (torch.tensor(v[step]) for v in (entry.channel_scale, entry.channel_shift))
            raw = raw + (q - y).square().mean().detach()
            corrected = corrected + (a * q + b - y).square().mean().detach()
    assert 0 < corrected <= raw * (1 + 1e-4)
