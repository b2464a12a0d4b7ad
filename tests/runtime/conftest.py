"""Tiny diffusion pipelines and plans for them; each pipeline is described once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cacheplan.types import (
    Budget,
    Certificate,
    DiffusionSpec,
    FeatureAction,
    FeatureEntry,
    FeaturePlan,
    FeatureSite,
    Gate,
    Provenance,
)


@dataclass(frozen=True, eq=False)
class Family:
    """A tiny pipeline, the arguments of a call, its description, and what it returns in full."""

    name: str
    pipe: Any
    call: dict[str, Any]
    spec: DiffusionSpec
    full: Tensor

    def run(self, seed: int = 1, **changes: Any) -> Tensor:
        from cacheplan.adapters.sampling import run_pipeline

        return run_pipeline(self.pipe, {**self.call, **changes}, seed=seed).latent

    def count(self) -> tuple[int, Tensor]:
        """FLOPs of the denoisers' calls in one run, and what it returns."""
        from cacheplan.adapters.flops import flop_counter
        from cacheplan.adapters.loop import watching

        counted = 0

        def on_call(loop: Any, inner: Any, args: Any, kwargs: Any) -> Any:
            nonlocal counted
            with flop_counter() as counter:
                output = inner(*args, **kwargs)
            counted += counter.get_total_flops()
            return output

        with watching(self.pipe, on_call=on_call):
            latent = self.run()
        return counted, latent

    @property
    def unet(self) -> bool:
        return hasattr(self.pipe, "unet")

    def blocks(self, step: int) -> range:
        """The blocks of the denoiser that runs at the step."""
        half = len(self.spec.blocks) // 2
        if not self.spec.expert_starts:
            return range(len(self.spec.blocks))
        return range(half) if step < self.spec.expert_starts[0] else range(half, 2 * half)


GetFamily = Callable[[str], Family]


@pytest.fixture(scope="session")
def family(tiny_pipelines: Any) -> GetFamily:
    known: dict[str, Family] = {}

    def get(name: str) -> Family:
        from cacheplan.adapters.denoiser import describe
        from cacheplan.adapters.sampling import run_pipeline

        if name not in known:
            pipe, call = tiny_pipelines.build(name)
            spec, full = describe(pipe, call), run_pipeline(pipe, call, seed=1).latent
            known[name] = Family(name, pipe, call, spec, full)
        return known[name]

    return get


def entry(
    part: str, first: int, last: int, step: int, do: str = "reuse", **action: Any
) -> FeatureEntry:
    site = FeatureSite(part=part, first=first, last=last)
    return FeatureEntry(site=site, step=step, action=FeatureAction(do=do, **action))


@pytest.fixture(scope="session", name="entry")
def entry_fixture() -> Callable[..., FeatureEntry]:
    """Build an entry from part, first, last, step, do and the fields of its action."""
    return entry


@pytest.fixture(scope="session")
def feature_plan() -> Callable[..., FeaturePlan]:
    """Build a plan from a description and entries in any order."""

    def build(
        spec: DiffusionSpec,
        entries: Sequence[FeatureEntry] = (),
        gate: Gate | None = None,
        dt_scale: tuple[float, ...] = (),
    ) -> FeaturePlan:
        def place(entry: FeatureEntry) -> tuple[Any, ...]:
            return entry.step, entry.site.first, entry.site.last, entry.site.part

        return FeaturePlan(
            model=spec,
            recipe="test",
            budget=Budget(asked="1", kept=1.0, reached=1.0),
            entries=tuple(sorted(entries, key=place)),
            gate=gate,
            dt_scale=dt_scale,
            certificate=Certificate(solver="none", value=0.0, bound=None, gap=None, status="Test."),
            predicted=None,
            measured=None,
            provenance=Provenance(profile=None, prompts=None, seed=0, versions=(), command=""),
        )

    return build


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a.float() - b.float()).norm() <= tolerance * b.float().norm())


@pytest.fixture(scope="session", name="close")
def close_fixture() -> Callable[..., bool]:
    """Whether two tensors differ by no more than a share of the second one."""
    return close


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield
