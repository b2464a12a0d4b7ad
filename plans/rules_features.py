"""What each part of a feature plan may say on its own."""

from __future__ import annotations

import math
from itertools import pairwise

from cacheplan.plans.compute import experts
from cacheplan.plans.rules import COUNT, NATURAL, POSITIVE, RANGES, need, one_of
from cacheplan.types import (
    Block,
    DiffusionSpec,
    FeatureAction,
    FeatureSite,
    Gate,
    Rescale,
    TextProjections,
)

PLAIN = FeatureAction(do="skip")
FINITE = "a finite number"


def finite(value: float) -> bool:
    return math.isfinite(value)


def check_diffusion(model: DiffusionSpec) -> None:
    """PlanError if the description of the model contradicts itself."""
    need(bool(model.blocks), "model.blocks", model.blocks, "at least one block")
    for index, block in enumerate(model.blocks):
        _check_block(block, f"model.blocks[{index}]")
    _check_distinct([block.path for block in model.blocks], "model.blocks", "path")
    need(bool(model.branches), "model.branches", model.branches, "at least one branch")
    _check_distinct(list(model.branches), "model.branches", "name")
    need(model.steps >= 1, "model.steps", model.steps, COUNT)
    levels = model.steps + 1
    need(len(model.sigmas) == levels, "model.sigmas", model.sigmas, f"{levels} noise levels")
    for index, sigma in enumerate(model.sigmas):
        need(finite(sigma), f"model.sigmas[{index}]", sigma, FINITE)
    starts = model.expert_starts
    inside = all(a < b for a, b in pairwise((0, *starts, model.steps)))
    need(inside, "model.expert_starts", starts, f"ascending steps from 1 below {model.steps}")
    need(model.cost >= 1, "model.cost", model.cost, COUNT)
    for expert in experts(model):
        spent = sum(block.cost for block in expert)
        need(spent <= model.cost, "model.cost", model.cost, f"at least the blocks' sum {spent}")
    sizes = bool(model.latent) and min(model.latent) >= 1
    need(sizes, "model.latent", model.latent, "sizes of at least 1")
    need(model.copies >= 1, "model.copies", model.copies, COUNT)


def check_site(site: FeatureSite, model: DiffusionSpec, path: str) -> None:
    """PlanError if the model has no such feature."""
    end = len(model.blocks)
    need(0 <= site.first < end, f"{path}.first", site.first, f"an integer from 0 below {end}")
    above = f"an integer above {site.first} and at most {end}"
    need(site.first < site.last <= end, f"{path}.last", site.last, above)
    if site.part not in RANGES:
        block = model.blocks[site.first]
        one_of((*(p.name for p in block.parts), *RANGES), f"{path}.part", site.part)
        end = site.first + 1
        need(site.last == end, f"{path}.last", site.last, f"{end} for a part of one block")
    elif site.part in ("hidden", "model"):
        need(site.first == 0, f"{path}.first", site.first, f'0 where part is "{site.part}"')
        need(site.last == end, f"{path}.last", site.last, f'{end} where part is "{site.part}"')


def check_action(action: FeatureAction, site: FeatureSite, path: str) -> None:
    """PlanError if the action contradicts itself or does not go with the site."""
    one_of(("reuse", "forecast", "skip"), f"{path}.do", action.do)
    need(action.order >= 0, f"{path}.order", action.order, NATURAL)
    for name in ("scale", "shift"):
        value = getattr(action, name)
        need(finite(value), f"{path}.{name}", value, FINITE)
    for name in ("weights", "channel_scale", "channel_shift"):
        for index, value in enumerate(getattr(action, name)):
            need(finite(value), f"{path}.{name}[{index}]", value, FINITE)
    scales, shifts = len(action.channel_scale), len(action.channel_shift)
    both = not scales or not shifts or scales == shifts
    need(both, f"{path}.channel_shift", action.channel_shift, f"none or {scales} numbers")
    if action.do == "skip":
        need(
            site.part == "delta",
            f"{path}.do",
            action.do,
            'reuse or forecast unless part is "delta"',
        )
        for name in ("scale", "shift", "channel_scale", "channel_shift"):
            value, default = getattr(action, name), getattr(PLAIN, name)
            need(value == default, f"{path}.{name}", value, f'{default} where do is "skip"')
    if action.do != "forecast":
        need(
            action.basis == "hold",
            f"{path}.basis",
            action.basis,
            f'"hold" where do is "{action.do}"',
        )
    if action.basis == "hold":
        need(action.order == 0, f"{path}.order", action.order, '0 where basis is "hold"')
    if action.basis == "hermite":
        need(action.order <= 2, f"{path}.order", action.order, 'at most 2 where basis is "hermite"')
    wanted = action.order + 1 if action.basis == "fitted" else 0
    need(
        len(action.weights) == wanted,
        f"{path}.weights",
        action.weights,
        f'{wanted} numbers, one more than the order, where basis is "fitted"'
        if wanted
        else 'none unless basis is "fitted"',
    )


def check_gate(gate: Gate, blocks: int) -> None:
    need(bool(gate.signal), "gate.signal", gate.signal, "the name of a signal")
    threshold = gate.threshold
    need(finite(threshold) and threshold >= 0, "gate.threshold", threshold, POSITIVE)
    one_of(("none", "sum", "product"), "gate.accumulate", gate.accumulate)
    most = gate.max_consecutive
    need(most is None or most >= 1, "gate.max_consecutive", most, COUNT)
    for name in ("warmup", "protect_last", "order"):
        value = getattr(gate, name)
        need(value >= 0, f"gate.{name}", value, NATURAL)
    if gate.rescale is not None:
        _check_rescale(gate.rescale)
    given, modulated = gate.rescale is not None, gate.signal == "modulation"
    wanted = "a curve where the signal is modulation, and nowhere else"
    need(given == modulated, "gate.rescale", gate.rescale, wanted)
    inside = 1 <= gate.blocks <= blocks
    need(inside, "gate.blocks", gate.blocks, f"an integer from 1 to {blocks}")


def _check_rescale(curve: Rescale) -> None:
    need(bool(curve.coefficients), "gate.rescale.coefficients", (), "at least one number")
    for index, value in enumerate(curve.coefficients):
        need(finite(value), f"gate.rescale.coefficients[{index}]", value, FINITE)
    for name in ("low", "high"):
        value = getattr(curve, name)
        need(finite(value) and value >= 0, f"gate.rescale.{name}", value, POSITIVE)
    need(curve.low <= curve.high, "gate.rescale.high", curve.high, f"at least {curve.low}")


def _check_block(block: Block, path: str) -> None:
    for name in ("cost", "size"):
        value = getattr(block, name)
        need(value >= 0, f"{path}.{name}", value, NATURAL)
    for index, part in enumerate(block.parts):
        at = f"{path}.parts[{index}]"
        plain = bool(part.name) and part.name not in RANGES
        need(plain, f"{at}.name", part.name, f"a name other than {', '.join(RANGES)}")
        for name in ("cost", "size"):
            value = getattr(part, name)
            need(value >= 0, f"{at}.{name}", value, NATURAL)
        if part.text is not None:
            _check_text(part.text, part.cost, f"{at}.text")
    _check_distinct([part.name for part in block.parts], f"{path}.parts", "name")
    spent = sum(part.cost for part in block.parts)
    need(spent <= block.cost, f"{path}.cost", block.cost, f"at least the parts' sum {spent}")


def _check_text(text: TextProjections, most: int, path: str) -> None:
    need(bool(text.paths), f"{path}.paths", text.paths, "at least one")
    _check_distinct(list(text.paths), f"{path}.paths", "path")
    for name in ("cost", "size", "given"):
        value = getattr(text, name)
        need(value >= 0, f"{path}.{name}", value, NATURAL)
    need(text.cost <= most, f"{path}.cost", text.cost, f"at most the part's cost {most}")


def _check_distinct(names: list[str], path: str, what: str) -> None:
    for index, name in enumerate(names):
        need(name not in names[:index], f"{path}[{index}]", name, f"a {what} that is not taken")
