"""Whether code that torch has compiled can follow a plan.

Compiled code runs through the handlers and is compiled once for every way in which they are set.
Only what is outside of it, the executor, decides; so there are no graph breaks.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import product

import torch

from cacheplan.errors import UnsupportedError
from cacheplan.runtime.features.program import Program
from cacheplan.runtime.features.wiring import Wiring
from cacheplan.types import FeatureSite


def check_compiled(program: Program, wiring: Wiring, *, gate: bool) -> None:
    """UnsupportedError if torch would stop compiling before the plan has seen all its steps.

    At its limit torch runs code uncompiled without a word, or fails if it compiles full graphs.
    """
    if not any(wiring.traced(handler) for handler in wiring.handlers().values()):
        return
    settings = _settings(program, wiring, gate=gate)
    limit: int = torch._dynamo.config.recompile_limit
    if settings > limit:
        what = "The denoiser" if wiring.whole else "One block"
        raise UnsupportedError(
            f"{what} would be compiled in {settings} ways to follow the plan, but torch stops at "
            f"{limit}: set torch._dynamo.config.recompile_limit = {settings}."
        )


def _settings(program: Program, wiring: Wiring, *, gate: bool) -> int:
    """In how many ways handlers are set for one piece of code.

    That is the whole denoiser, or any block, as blocks of one class share their code.
    """
    found: set[Hashable] = set()
    sites = wiring.sites if wiring.whole else tuple(wiring.of_part)
    steps = [step for step in range(program.spec.steps) if program.blocks(step) == wiring.blocks]
    for step, promoted in product(steps, (False, True) if gate else (False,)):
        stored = program.stores(step, promoted=promoted)
        left_out = {} if promoted else program.actions[step]
        if any(site.part == "model" for site in left_out):
            continue
        ways: dict[FeatureSite, object] = {site: "keep" for site in sites if site in stored}
        ways |= {site: left_out[site].do == "skip" for site in sites if site in left_out}
        texts = {("text", step in program.first_steps)} if wiring.texts.handlers else set()
        if wiring.whole:
            found.add(frozenset(ways.items() | texts))
            continue
        for block in wiring.blocks:
            parts = (site for site in sites if site.first == block)
            found.add(frozenset({(site.part, ways.get(site)) for site in parts} | texts))
    return len(found)
