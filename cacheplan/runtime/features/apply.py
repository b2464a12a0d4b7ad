"""`with apply_features(pipe, plan) as report: pipe(...)`: install a plan, restore the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from cacheplan.adapters.calls import unwrapped
from cacheplan.adapters.loop import denoisers, watching
from cacheplan.adapters.taps import tapped
from cacheplan.runtime.features.checks import check_attention, check_gate, check_pipeline
from cacheplan.runtime.features.compiled import check_compiled
from cacheplan.runtime.features.executor import Executor
from cacheplan.runtime.features.gate import MODULATION, Guard
from cacheplan.runtime.features.guidance import Guidance
from cacheplan.runtime.features.linears import Linears
from cacheplan.runtime.features.program import Program
from cacheplan.runtime.features.report import FeatureReport
from cacheplan.runtime.features.step_size import StepSizes
from cacheplan.runtime.features.wiring import Wiring
from cacheplan.types import FeaturePlan


@contextmanager
def apply_features(
    pipe: Any, plan: FeaturePlan, *, cache_memory: int | None = None
) -> Iterator[FeatureReport]:
    """Make every run of `pipe` follow `plan` until the block ends; yield a report of the newest.

    `cache_memory` is the number of bytes that kept features may take.  Leaving the block restores
    modules and scheduler exactly.

    Raises ModelMismatchError if the plan was made for another pipeline, UnsupportedError if the
    pipeline, its call or the plan is outside what the runtime does, or takes too much memory.
    """
    check_pipeline(plan, pipe)
    program = Program(plan)
    found = denoisers(pipe)
    first = next(iter(found))
    report = FeatureReport(plan, unwrapped(found[first]).dtype.itemsize, cache_memory)
    sizes = StepSizes(plan.dt_scale, pipe.scheduler)
    guard = Guard(plan.gate, program.spec.steps, program.spec.sigmas) if plan.gate else None
    wirings: dict[str, Wiring] = {}
    for blocks in program.ranges:
        path = program.spec.blocks[blocks.start].path
        name = next((name for name in found if path.startswith(f"{name}.")), first)
        prefix = f"{name}." if path.startswith(f"{name}.") else ""
        wiring = wirings[name] = Wiring(program, found[name], prefix, blocks)
        if plan.gate:
            check_gate(plan.gate, program, wiring.root, whole=wiring.whole)
        if guard and guard.inside:
            for index in blocks[: guard.gate.blocks]:
                wiring.need(index)
        if plan.gate and plan.gate.signal == MODULATION:
            check_attention(plan.gate, wiring)
        check_compiled(program, wiring, gate=guard is not None)
    linears = Linears(plan, found)
    guidance = Guidance(program.spec, pipe)
    executor = Executor(program, wirings, guard, sizes, guidance, report)
    with ExitStack() as stack:
        for name, module in found.items():
            stack.enter_context(tapped(unwrapped(module), linears.handlers(name)))
        for wiring in wirings.values():
            stack.enter_context(tapped(wiring.root, wiring.handlers()))
        watched = watching(
            pipe,
            on_start=executor.on_start,
            on_call=linears.following(executor.on_call),
            on_step=executor.on_step,
        )
        stack.enter_context(watched)
        yield report
