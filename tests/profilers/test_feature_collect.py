"""Profiles of tiny pipelines: watching changes nothing, and what is measured is what happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cacheplan.adapters.denoiser import Observation, denoisers, observe, split
from cacheplan.adapters.loop import watching
from cacheplan.adapters.sampling import run_pipeline
from cacheplan.profilers.feature_ablation import whole_site
from cacheplan.profilers.feature_collect import collect_features, feature_sites
from cacheplan.profilers.feature_observer import model_delta
from cacheplan.profilers.feature_prompts import PicturePrompt, digest, picture_prompt
from cacheplan.profilers.settings import AXES, FeatureSettings
from cacheplan.profilers.store import ProfileState, dumps, finish, read_state, write_state
from cacheplan.runtime.features.apply import apply_features
from cacheplan.types import (
    Budget,
    Certificate,
    FeatureAction,
    FeatureEntry,
    FeaturePlan,
    FeatureProfile,
    FeatureSite,
    Provenance,
)

PROMPTS = [picture_prompt({}, seed) for seed in (7, 8)]  # embeddings are in the call


@dataclass(eq=False)
class Bench:
    """A tiny pipeline with its profile; `full` is the final latent of each prompt."""

    pipe: Any
    call: dict[str, Any]
    seen: Observation
    full: list[Tensor]
    state: ProfileState

    @property
    def profile(self) -> FeatureProfile:
        found = finish(self.state, "profile")
        assert isinstance(found, FeatureProfile)
        return found

    def table(self, name: str) -> Any:
        return self.profile.statistics[name].mean

    def gram(self, part: str, first: int, last: int) -> Any:
        site = FeatureSite(part=part, first=first, last=last)
        return self.table("gram")[self.profile.sites.index(site)]


def settings(seen: Observation, prompts: list[PicturePrompt], **changes: Any) -> FeatureSettings:
    fields: dict[str, Any] = {
        "model": seen.spec,
        "sites": feature_sites(seen),
        "lags": seen.spec.steps - 1,
        "tokens": 4096,
        "probes": (whole_site(seen.spec),),
        "ablate": 1,
        "prompts": len(prompts),
        "prompts_digest": digest(prompts),
        "seed": 0,
        "versions": (),
    }
    return FeatureSettings(**(fields | changes))


def collect(
    bench: Bench, state: ProfileState, save: Callable[[ProfileState], None] = lambda state: None
) -> ProfileState:
    collect_features(bench.pipe, bench.seen, bench.call, PROMPTS, state, save=save)
    return state


@pytest.fixture(scope="module")
def get_bench(tiny_pipeline: Any) -> Callable[[str], Bench]:
    known: dict[str, Bench] = {}

    def get(name: str) -> Bench:
        if name not in known:
            pipe, call = tiny_pipeline(name)
            full = [run_pipeline(pipe, call, seed=p.seed).latent for p in PROMPTS]
            seen = observe(pipe, call)
            state = ProfileState(settings(seen, PROMPTS), range(len(PROMPTS)))
            known[name] = Bench(pipe, call, seen, full, state)
            collect(known[name], state)
        return known[name]

    return get


@pytest.fixture(params=["pixart", "flux", "wan", "wan_experts", "stable_diffusion"])
def bench(request: pytest.FixtureRequest, get_bench: Callable[[str], Bench]) -> Bench:
    return get_bench(request.param)


def test_profiles_are_complete(bench: Bench) -> None:
    spec, sites = bench.seen.spec, bench.profile.sites
    assert len(set(sites)) == len(sites)
    sizes = {"site": len(sites), "step": spec.steps, "lag": spec.steps, "probe": 1}
    sizes["older"] = spec.steps
    sizes["channel"] = len(bench.table("channel_mean"))
    for name, found in bench.profile.statistics.items():
        assert found.mean.shape == tuple(sizes[axis] for axis in AXES[name]), name
        assert found.count == (1 if "probe" in AXES[name] else 2)
        assert np.isfinite(found.mean).all()
    gram = bench.table("gram")
    np.testing.assert_allclose(gram[:, :, 0].mean(1), 1, rtol=1e-9)
    for site, own in zip(sites, gram, strict=True):
        apart = spec.expert_starts and site.part not in ("hidden", "model")
        half = len(spec.blocks) // 2
        runs = [
            not apart or (step >= spec.expert_starts[0]) == (site.first >= half)
            for step in range(spec.steps)
        ]
        assert (own[runs, 0] > 0).all()
        assert not own[np.logical_not(runs)].any()


def test_nothing_is_left_behind(bench: Bench) -> None:
    again = [run_pipeline(bench.pipe, bench.call, seed=p.seed).latent for p in PROMPTS]
    assert all(torch.equal(a, b) for a, b in zip(again, bench.full, strict=True))
    for module in denoisers(bench.pipe).values():
        assert type(module).__module__.startswith("diffusers")
        assert all(type(m).__name__ != "Tap" for m in module.modules())


def test_a_watched_run_ends_in_the_same_latent(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []

    def run(*args: Any, **kwargs: Any) -> Any:
        ends.append(run_pipeline(*args, **kwargs))
        return ends[-1]

    monkeypatch.setattr("cacheplan.profilers.feature_collect.run_pipeline", run)
    seen = settings(bench.seen, PROMPTS[:1], ablate=0)
    collect(bench, ProfileState(seen, range(1)))
    assert len(ends) == 1
    assert torch.equal(ends[0].latent, bench.full[0])


def recorded(bench: Bench, index: int, seed: int) -> list[list[Tensor]]:
    """Per branch and step what a block adds to its streams, by ordinary hooks."""
    block = bench.seen.spec.blocks[index]
    name, path = split(bench.pipe, block.path)
    module = denoisers(bench.pipe)[name].get_submodule(path)
    branches = bench.seen.spec.branches
    found: list[list[Tensor]] = [[] for _ in branches]
    calls = 0

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal calls
        given = {**dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False))}
        given |= kwargs
        if isinstance(output, Tensor):
            deltas = [output - given["hidden_states"]]
        else:  # Flux: (encoder, hidden)
            deltas = [
                output[1] - given["hidden_states"],
                output[0] - given["encoder_hidden_states"],
            ]
        tokens = torch.cat([delta.flatten(0, -2) for delta in deltas])
        found[calls % len(branches)].append(tokens.clone())
        calls += 1

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        run_pipeline(bench.pipe, bench.call, seed=seed)
    finally:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["pixart", "flux", "wan"])
def test_moments_of_a_block(get_bench: Callable[[str], Bench], name: str) -> None:
    bench = get_bench(name)
    expected = np.zeros((len(PROMPTS), bench.seen.spec.steps, bench.seen.spec.steps))
    for own, prompt in zip(expected, PROMPTS, strict=True):
        for values in recorded(bench, 1, prompt.seed):
            F = [value.double().numpy() for value in values]
            for t in range(len(F)):
                own[t, : t + 1] += [(F[t] * F[t - lag]).mean() for lag in range(t + 1)]
        own /= own[:, 0].mean()
    np.testing.assert_allclose(bench.gram("delta", 1, 2), expected.mean(0), rtol=1e-4, atol=1e-6)


def test_the_model_is_what_it_returns_minus_its_latent(bench: Bench) -> None:
    spec, found = bench.seen.spec, []

    def on_call(loop: Any, inner: Any, args: Any, kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        delta = model_delta(loop.module, output, args, kwargs)
        assert delta.shape[1:] == spec.latent
        found.append((loop.index(spec.branches), delta.double().square().mean()))
        return output

    with watching(bench.pipe, on_call=on_call):
        run_pipeline(bench.pipe, bench.call, seed=7)
    means = np.zeros(spec.steps)
    for branch in range(len(spec.branches)):
        means += [float(square) for index, square in found if index == branch]
    one = ProfileState(settings(bench.seen, PROMPTS[:1], ablate=0), range(1))
    profile = finish(collect(bench, one), "profile")
    np.testing.assert_allclose(
        profile.statistics["gram"].mean[-1, :, 0], means / means.mean(), rtol=1e-4
    )


def test_deltas_with_pictures_beside_the_latent() -> None:
    class Denoiser(torch.nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states

    given, made = torch.randn(1, 5, 2, 3, 3), torch.randn(1, 3, 2, 3, 3)
    assert torch.equal(model_delta(Denoiser(), made, (given,), {}), made - given[:, :3])
    assert torch.equal(model_delta(Denoiser(), given, (made,), {}), given[:, :3] - made)
    flat, wide = torch.randn(1, 6, 4), torch.randn(1, 6, 8)
    assert torch.equal(model_delta(Denoiser(), wide, (flat,), {}), wide[..., :4] - flat)


def holding(bench: Bench, site: FeatureSite, step: int) -> FeaturePlan:
    action = FeatureAction(do="reuse")
    return FeaturePlan(
        model=bench.seen.spec,
        recipe="test",
        budget=Budget(asked="1", kept=1.0, reached=1.0),
        entries=(FeatureEntry(site=site, step=step, action=action),),
        certificate=Certificate(solver="none", value=0.0, bound=None, gap=None, status="Test."),
        predicted=None,
        measured=None,
        provenance=Provenance(profile=None, prompts=None, seed=0, versions=(), command=""),
    )


def test_ablations_are_runs_of_plans(bench: Bench) -> None:
    """Profiler and runtime, written apart, hold the same feature."""
    spec, errors = bench.seen.spec, bench.table("final_error")[0]
    for step in range(spec.steps):
        if step in (0, *spec.expert_starts):
            assert errors[step] == 0
            continue
        with apply_features(bench.pipe, holding(bench, bench.profile.probes[0], step)):
            latent = run_pipeline(bench.pipe, bench.call, seed=PROMPTS[0].seed).latent
        difference = (latent.double() - bench.full[0].double()).square().sum()
        expected = float(difference / bench.full[0].double().square().sum())
        assert expected > 0
        assert errors[step] == pytest.approx(expected, rel=1e-6, abs=2.0**-58)


def test_damage_is_what_the_feature_changes(bench: Bench) -> None:
    gram = bench.table("gram")[bench.profile.sites.index(bench.profile.probes[0])]
    damage, gone = bench.table("final_damage")[0], bench.profile.statistics["gram"].std
    assert damage[0] == 0
    assert (damage[1:] > 0).all()
    output, starts = bench.table("output_damage")[0], bench.seen.spec.expert_starts
    held = [step for step in range(1, len(output)) if step not in starts]
    assert (output[held] > 0).all()
    assert not np.delete(output, held).any()
    if not gone.any():  # means over other prompts
        np.testing.assert_allclose(damage[1:], gram[1:, 0] + gram[:-1, 0] - 2 * gram[1:, 1])


def test_a_feature_that_stands_still_costs_nothing(
    tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call = tiny_pipeline("pixart")
    seen = observe(pipe, call)
    stopped = 4  # from then on the last block repeats itself
    block, last = pipe.transformer.transformer_blocks[-1], list[Any]()
    forward = type(block).forward

    def frozen(*args: Any, **kwargs: Any) -> Any:
        if place[0].step < stopped:
            last[:] = [forward(block, *args, **kwargs)]
        return last[0]

    place: list[Any] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        with watching(pipe) as loop:
            place[:] = [loop]
            return run_pipeline(*args, **kwargs)

    monkeypatch.setattr(block, "forward", frozen)
    monkeypatch.setattr("cacheplan.profilers.feature_collect.run_pipeline", run)
    state = ProfileState(settings(seen, PROMPTS[:1]), range(1))
    collect_features(pipe, seen, call, PROMPTS[:1], state, save=lambda state: None)
    found = finish(state, "profile").statistics
    np.testing.assert_array_equal(found["final_error"].mean[0] > 0, [0, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(found["final_damage"].mean[0, stopped:], 0, atol=1e-7)


def test_prompts_add_up(bench: Bench) -> None:
    """Prompts one by one, in shards and after an interruption: the same bytes."""
    pieces = []
    for index in range(2):
        state = ProfileState(bench.state.settings, range(index, 2, 2))
        pieces.append(collect(bench, state))
        assert state.done == {index}
    alone = [state.sums["gram"].mean() for state in pieces]
    np.testing.assert_allclose(bench.table("gram"), np.mean(alone, axis=0), rtol=1e-12)
    assert "final_error" not in pieces[1].sums


class GoneError(Exception):
    """The machine went away."""


def test_an_interrupted_profile_goes_on(get_bench: Callable[[str], Bench], tmp_path: Any) -> None:
    bench, path = get_bench("pixart"), tmp_path / "profile.part"
    saved: list[int] = []

    def save(state: ProfileState) -> None:
        saved.append(len(state.done))
        write_state(state, path)
        if len(saved) == 1:
            raise GoneError

    with pytest.raises(GoneError):
        collect(bench, ProfileState(bench.state.settings, range(2)), save)
    resumed = read_state(path)
    assert resumed.done == {0}
    collect(bench, resumed, save)
    assert saved == [1, 2]
    assert dumps(resumed) == dumps(bench.state)
    assert read_state(path).done == {0, 1}


def test_progress_is_told(get_bench: Callable[[str], Bench]) -> None:
    bench, told = get_bench("pixart"), list[tuple[int, int, str]]()
    state = ProfileState(bench.state.settings, range(2))
    collect_features(
        bench.pipe,
        bench.seen,
        bench.call,
        PROMPTS,
        state,
        save=lambda state: None,
        progress=lambda done, total, words: told.append((done, total, words)),
    )
    assert told[0] == (0, 2, "watching features")
    assert (0, 2, "holding step 3 of 6") in told
    assert told[-2:] == [(1, 2, "watching features"), (2, 2, "done")]


def test_only_some_tokens_and_lags(get_bench: Callable[[str], Bench]) -> None:
    bench = get_bench("pixart")
    few = settings(bench.seen, PROMPTS, tokens=8, lags=2, ablate=0)
    profile = finish(collect(bench, ProfileState(few, range(2))), "profile")
    assert isinstance(profile, FeatureProfile)
    gram = profile.statistics["gram"].mean
    assert gram.shape == (len(profile.sites), 6, 3)
    close = bench.table("gram")[:, :, :3]
    assert abs(gram - close).max() < 0.5 * abs(close).max()
    assert "final_error" not in profile.statistics
