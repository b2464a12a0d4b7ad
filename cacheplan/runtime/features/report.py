"""What a run really did, next to what its plan promised."""

from __future__ import annotations

from dataclasses import dataclass, field

from cacheplan.errors import UnsupportedError
from cacheplan.plans.compute import (
    full_flops,
    planned_flops,
    planned_memory,
    saved_flops,
    step_flops,
)
from cacheplan.runtime.features.program import Program
from cacheplan.types import FeaturePlan, FeatureSite


@dataclass
class Count:
    """Steps of one run at which a feature was computed, skipped, or computed only by the gate.

    `promoted` are among the computed ones.  Steps at which it lies in something else that was
    skipped are neither.
    """

    computed: int = 0
    skipped: int = 0
    promoted: int = 0


@dataclass
class FeatureReport:
    """The newest run under an applied plan; FLOPs are for one prompt, bytes for all of them."""

    plan: FeaturePlan
    element_bytes: int
    limit: int | None = None  # of kept features, in bytes
    runs: int = 0
    steps: int = 0  # of the newest run, so far
    sites: dict[FeatureSite, Count] = field(default_factory=dict)
    promoted: list[int] = field(default_factory=list)  # steps that the gate computed
    flops: int = 0  # of its steps so far, by their sites' costs; without what a gate's blocks cost
    prompts: int = 1
    peak_bytes: int = 0  # of kept features; a learned variance, kept as it is, comes on top
    gate_bytes: int = 0  # what the gate keeps to compare with

    def __post_init__(self) -> None:
        self._refuse(1)

    @property
    def planned_flops(self) -> int:
        """FLOPs of a run when no gate computes more."""
        return planned_flops(self.plan)

    @property
    def full_flops(self) -> int:
        """FLOPs of a run without a plan."""
        return full_flops(self.plan.model)

    @property
    def planned_bytes(self) -> int:
        """The most that kept features take, for all prompts of the run."""
        return self.prompts * planned_memory(self.plan, self.element_bytes)

    def begin(self, rows: int) -> None:
        """Another run starts, whose denoiser is given `rows` latents at once."""
        copies = self.plan.model.copies
        if rows % copies:
            raise UnsupportedError(
                f"The denoiser is given {rows} latents at once, but was profiled with {copies} "
                "for each prompt: use the guidance settings of the profile."
            )
        self.prompts = rows // copies
        self._refuse(self.prompts)
        self.runs += 1
        self.sites = {entry.site: Count() for entry in self.plan.entries}
        self.promoted = []
        self.steps = self.flops = self.peak_bytes = self.gate_bytes = 0

    def count(self, program: Program, step: int, *, promoted: bool) -> None:
        """A step is over."""
        actions, spec, once = program.actions[step], program.spec, program.text_once
        self.steps += 1
        self.flops += step_flops(spec, step, text_once=once)
        if promoted:
            self.promoted.append(step)
        for site, count in self.sites.items():
            count.computed += program.computed(site, step, promoted=promoted)
            if site in actions:
                count.promoted += promoted
                count.skipped += not promoted
                saved = 0 if promoted else saved_flops(spec, site, step, text_once=once)
                self.flops -= saved

    def see(self, peak: int, gate: int) -> None:
        self.peak_bytes = max(self.peak_bytes, peak)
        self.gate_bytes = max(self.gate_bytes, gate)
        self._refuse(self.prompts, self.peak_bytes)

    def _refuse(self, prompts: int, measured: int = 0) -> None:
        needed = max(measured, prompts * planned_memory(self.plan, self.element_bytes))
        if self.limit is not None and needed > self.limit:
            many = f"{prompts} prompts" if prompts > 1 else "a prompt"
            raise UnsupportedError(
                f"The plan keeps {needed} bytes of features for {many}, but cache_memory allows "
                f"{self.limit}: allow {needed}, or solve a plan that keeps less."
            )
