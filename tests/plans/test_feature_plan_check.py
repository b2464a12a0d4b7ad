from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cacheplan.errors import PlanError
from cacheplan.plans.check import check
from cacheplan.plans.io import read_plan
from cacheplan.types import (
    FeatureAction,
    FeatureDamage,
    FeatureEntry,
    FeaturePlan,
    FeatureSite,
    Rescale,
    TextProjections,
)

# Eight steps of three blocks, each of attention, cross_attention and mlp; six entries.
LOADED = read_plan(Path(__file__).with_name("golden_features.json"))
assert isinstance(LOADED, FeaturePlan)
PLAN = LOADED
NAN = float("nan")
Change = Callable[[], FeaturePlan]
REUSE = FeatureAction(do="reuse")
CURVE = Rescale(coefficients=(2.0, 0.1), low=0.1, high=0.4)


def plan(**changes: Any) -> Change:
    return lambda: replace(PLAN, **changes)


def piece(name: str, **changes: Any) -> Change:
    return plan(**{name: replace(getattr(PLAN, name), **changes)})


def block(index: int, **changes: Any) -> Change:
    blocks = list(PLAN.model.blocks)
    blocks[index] = replace(blocks[index], **changes)
    return piece("model", blocks=tuple(blocks))


def parts(index: int, **changes: Any) -> Change:
    found = list(PLAN.model.blocks[0].parts)
    found[index] = replace(found[index], **changes)
    return block(0, parts=tuple(found))


def text(**changes: Any) -> Change:
    """The first block's cross-attention, of cost 150, with keys and values of the text."""
    fields: dict[str, Any] = {"paths": ("to_k", "to_v"), "cost": 60, "size": 9, "given": 5}
    return parts(1, text=TextProjections(**(fields | changes)))


def entry(
    part: str, first: int, last: int, step: int, action: FeatureAction = REUSE
) -> FeatureEntry:
    site = FeatureSite(part=part, first=first, last=last)
    return FeatureEntry(site=site, step=step, action=action)


def only(*entries: FeatureEntry) -> Change:
    return plan(entries=entries)


def site(part: str, first: int, last: int, step: int = 3) -> Change:
    return only(entry(part, first, last, step))


def action(part: str = "mlp", **fields: Any) -> Change:
    last = 1 if part != "hidden" else 3
    return only(entry(part, 0, last, 3, FeatureAction(**{"do": "forecast", **fields})))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (piece("model", blocks=()), "model.blocks is [], expected at least one block"),
        (block(1, cost=-1), "model.blocks[1].cost is -1, expected an integer of at least 0"),
        (block(1, size=-1), "model.blocks[1].size is -1, expected an integer of at least 0"),
        (block(1, cost=949), "model.blocks[1].cost is 949, expected at least the parts' sum 950"),
        (
            block(2, path="transformer_blocks.0"),
            'model.blocks[2] is "transformer_blocks.0", expected a path that is not taken',
        ),
        (parts(0, cost=-1), "model.blocks[0].parts[0].cost is -1, expected an integer of at least"),
        (parts(1, size=-1), "model.blocks[0].parts[1].size is -1, expected an integer of at least"),
        (
            parts(1, name="delta"),
            'model.blocks[0].parts[1].name is "delta", '
            "expected a name other than delta, hidden, model, branch",
        ),
        (parts(1, name=""), 'model.blocks[0].parts[1].name is "", expected a name other than'),
        (
            parts(1, name="attention"),
            'model.blocks[0].parts[1] is "attention", expected a name that is not taken',
        ),
        (piece("model", branches=()), "model.branches is [], expected at least one branch"),
        (
            piece("model", branches=("a", "a")),
            'model.branches[1] is "a", expected a name that is not taken',
        ),
        (piece("model", steps=0), "model.steps is 0, expected an integer of at least 1"),
        (piece("model", sigmas=(1.0, 0.0)), "model.sigmas is [1.0, 0.0], expected 9 noise levels"),
        (
            piece("model", sigmas=(NAN,) * 9),
            "model.sigmas[0] is NaN, expected a finite number",
        ),
        (
            piece("model", expert_starts=(0,)),
            "model.expert_starts is [0], expected ascending steps from 1 below 8",
        ),
        (piece("model", expert_starts=(5, 3)), "model.expert_starts is [5, 3], expected ascending"),
        (
            piece("model", expert_starts=(8,)),
            "model.expert_starts is [8], expected ascending",
        ),
        (piece("model", cost=2999), "model.cost is 2999, expected at least the blocks' sum 3000"),
        (piece("model", latent=()), "model.latent is [], expected sizes of at least 1"),
        (piece("model", latent=(4, 0)), "model.latent is [4, 0], expected sizes of at least 1"),
        (piece("budget", kept=0.0), "budget.kept is 0.0, expected a number above 0 and at most 1"),
        (piece("budget", reached=0.7), "budget.reached is 0.7, expected a number from 0 to the"),
        (piece("budget", length=9), "budget.length is 9, expected none in a plan for features"),
        (piece("budget", max_rows=9), "budget.max_rows is 9, expected none in a plan for features"),
        (site("mlp", -1, 0), "entries[0].site.first is -1, expected an integer from 0 below 3"),
        (site("delta", 3, 4), "entries[0].site.first is 3, expected an integer from 0 below 3"),
        (
            site("delta", 1, 1),
            "entries[0].site.last is 1, expected an integer above 1 and at most 3",
        ),
        (
            site("delta", 1, 4),
            "entries[0].site.last is 4, expected an integer above 1 and at most 3",
        ),
        (
            site("mlp_context", 1, 2),
            'entries[0].site.part is "mlp_context", expected one of attention, cross_attention, '
            "mlp, delta, hidden, model, branch",
        ),
        (site("mlp", 1, 3), "entries[0].site.last is 3, expected 2 for a part of one block"),
        (site("hidden", 1, 3), 'entries[0].site.first is 1, expected 0 where part is "hidden"'),
        (site("model", 0, 2), 'entries[0].site.last is 2, expected 3 where part is "model"'),
        (site("mlp", 0, 1, -1), "entries[0].step is -1, expected an integer from 0 below 8"),
        (site("mlp", 0, 1, 8), "entries[0].step is 8, expected an integer from 0 below 8"),
        (
            site("mlp", 0, 1, 0),
            "entries[0].step is 0, expected a step that is not the first of its denoiser",
        ),
        (
            piece("model", expert_starts=(4,)),
            "entries[3].step is 4, expected a step that is not the first of its denoiser",
        ),
        (
            action(do="compute"),
            'entries[0].action.do is "compute", expected one of reuse, forecast, skip',
        ),
        (action(order=-1), "entries[0].action.order is -1, expected an integer of at least 0"),
        (action(scale=NAN), "entries[0].action.scale is NaN, expected a finite number"),
        (action(shift=NAN), "entries[0].action.shift is NaN, expected a finite number"),
        (
            action(channel_scale=(1.0, NAN)),
            "entries[0].action.channel_scale[1] is NaN, expected a finite number",
        ),
        (
            action(channel_shift=(NAN,)),
            "entries[0].action.channel_shift[0] is NaN, expected a finite number",
        ),
        (
            action(channel_scale=(1.0, 1.0), channel_shift=(0.0,)),
            "entries[0].action.channel_shift is [0.0], expected none or 2 numbers",
        ),
        (
            action(do="skip"),
            'entries[0].action.do is "skip", expected reuse or forecast unless part is "delta"',
        ),
        (
            action("delta", do="skip", scale=0.5),
            'entries[0].action.scale is 0.5, expected 1.0 where do is "skip"',
        ),
        (
            action("delta", do="skip", basis="taylor"),
            'entries[0].action.basis is "taylor", expected "hold" where do is "skip"',
        ),
        (
            action(do="reuse", basis="taylor"),
            'entries[0].action.basis is "taylor", expected "hold" where do is "reuse"',
        ),
        (
            action(do="reuse", order=1),
            'entries[0].action.order is 1, expected 0 where basis is "hold"',
        ),
        (
            action(basis="hermite", order=3),
            'entries[0].action.order is 3, expected at most 2 where basis is "hermite"',
        ),
        (
            action(basis="fitted", order=1, weights=(1.0,)),
            "entries[0].action.weights is [1.0], expected 2 numbers, one more than the order, "
            'where basis is "fitted"',
        ),
        (
            action(basis="taylor", order=1, weights=(2.0, -1.0)),
            'entries[0].action.weights is [2.0, -1.0], expected none unless basis is "fitted"',
        ),
        (
            action(basis="fitted", weights=(NAN,)),
            "entries[0].action.weights[0] is NaN, expected a finite number",
        ),
        (
            only(entry("mlp", 0, 1, 4), entry("mlp", 0, 1, 3)),
            "entries[1] is mlp of block 0 at step 3 after mlp of block 0 at step 4, "
            "expected each site once, sorted by step, first, last and part",
        ),
        (
            only(entry("mlp", 0, 1, 3), entry("attention", 0, 1, 3)),
            "entries[1] is attention of block 0 at step 3 after mlp of block 0 at step 3, expected",
        ),
        (
            only(entry("mlp", 0, 1, 3), entry("mlp", 0, 1, 3)),
            "entries[1] is mlp of block 0 at step 3 after mlp of block 0 at step 3, expected",
        ),
        (
            only(entry("delta", 0, 3, 3), entry("mlp", 1, 2, 3)),
            "entries[1] is mlp of block 1 at step 3, which has blocks in common with "
            "delta of blocks 0-2 at step 3, expected only one of them",
        ),
        (
            only(entry("attention", 0, 1, 3), entry("hidden", 0, 3, 3)),
            "entries[1] is hidden at step 3, which has blocks in common with "
            "attention of block 0 at step 3",
        ),
        (
            only(entry("delta", 0, 2, 3), entry("delta", 1, 3, 3)),
            "entries[1] is delta of blocks 1-2 at step 3, which has blocks in common with "
            "delta of blocks 0-1 at step 3",
        ),
        (
            only(entry("hidden", 0, 3, 3), entry("model", 0, 3, 3)),
            "entries[1] is model at step 3, which has blocks in common with hidden at step 3",
        ),
        (piece("gate", signal=""), 'gate.signal is "", expected the name of a signal'),
        (piece("gate", threshold=-0.1), "gate.threshold is -0.1, expected a number of at least 0"),
        (piece("gate", threshold=NAN), "gate.threshold is NaN, expected a number of at least 0"),
        (
            piece("gate", accumulate="mean"),
            'gate.accumulate is "mean", expected one of none, sum, product',
        ),
        (
            piece("gate", max_consecutive=0),
            "gate.max_consecutive is 0, expected an integer of at least 1",
        ),
        (piece("gate", warmup=-1), "gate.warmup is -1, expected an integer of at least 0"),
        (
            piece("gate", protect_last=-1),
            "gate.protect_last is -1, expected an integer of at least 0",
        ),
        (piece("gate", order=-1), "gate.order is -1, expected an integer of at least 0"),
        (
            piece("gate", rescale=CURVE),
            "gate.rescale is ",
        ),
        (
            piece("gate", signal="modulation"),
            "gate.rescale is null, expected a curve where the signal is modulation",
        ),
        (
            piece("gate", signal="modulation", rescale=replace(CURVE, coefficients=())),
            "gate.rescale.coefficients is [], expected at least one number",
        ),
        (
            piece("gate", signal="modulation", rescale=replace(CURVE, coefficients=(1.0, NAN))),
            "gate.rescale.coefficients[1] is NaN, expected a finite number",
        ),
        (
            piece("gate", signal="modulation", rescale=replace(CURVE, low=-1.0)),
            "gate.rescale.low is -1.0, expected a number of at least 0",
        ),
        (
            piece("gate", signal="modulation", rescale=replace(CURVE, high=0.05)),
            "gate.rescale.high is 0.05, expected at least 0.1",
        ),
        (piece("gate", blocks=0), "gate.blocks is 0, expected an integer from 1 to 3"),
        (piece("gate", blocks=4), "gate.blocks is 4, expected an integer from 1 to 3"),
        (
            plan(dt_scale=(1.0,) * 7),
            "dt_scale is [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], ",
        ),
        (plan(dt_scale=(1.0,) * 7 + (-0.1,)), "dt_scale[7] is -0.1, expected a number from 0 to 4"),
        (plan(dt_scale=(4.1,) * 8), "dt_scale[0] is 4.1, expected a number from 0 to 4"),
        (plan(text_once=True), "text_once is true, expected false where no part has a `text`"),
        (text(paths=()), "model.blocks[0].parts[1].text.paths is [], expected at least one"),
        (
            text(paths=("to_k", "to_k")),
            'model.blocks[0].parts[1].text.paths[1] is "to_k", expected a path that is not taken',
        ),
        (text(size=-1), "model.blocks[0].parts[1].text.size is -1, expected an integer of at"),
        (text(given=-1), "model.blocks[0].parts[1].text.given is -1, expected an integer of at"),
        (text(cost=151), "model.blocks[0].parts[1].text.cost is 151, expected at most the part's"),
        (
            piece("certificate", gap=-0.1),
            "certificate.gap is -0.1, expected a number of at least 0",
        ),
        (
            piece("predicted", error=-1.0),
            "predicted.error is -1.0, expected a number of",
        ),
        (piece("measured", error=NAN), "measured.error is NaN, expected a number of at least 0"),
        (piece("measured", psnr=NAN), "measured.psnr is NaN, expected a finite number"),
        (piece("measured", ssim=1.1), "measured.ssim is 1.1, expected a number from -1 to 1"),
        (piece("measured", lpips=-0.1), "measured.lpips is -0.1, expected a number of at least 0"),
        (piece("measured", lpips=NAN), "measured.lpips is NaN, expected a number of at least 0"),
        (
            piece("measured", prompts=-1),
            "measured.prompts is -1, expected an integer",
        ),
    ],
)
def test_check_refuses_feature_plans(change: Change, sentence: str) -> None:
    with pytest.raises(PlanError) as caught:
        check(change())
    assert str(caught.value).startswith(sentence)


def test_check_accepts_every_kind_of_feature() -> None:
    check(PLAN)
    check(replace(text()(), text_once=True))
    check(replace(PLAN, gate=None, dt_scale=(), predicted=None, measured=FeatureDamage(error=0.0)))
    whole = ("model", 0, 3, 5)
    check(only(entry("attention", 0, 1, 3), entry("mlp", 0, 1, 3), entry("delta", 1, 3, 3))())
    check(only(entry("branch", 1, 3, 3), entry("hidden", 0, 3, 4), entry(*whole))())
    check(action(basis="spline", order=9)())  # whether it can be run is another question


def test_steps_where_another_denoiser_takes_over_are_computed() -> None:
    model = replace(PLAN.model, expert_starts=(4,))
    check(replace(PLAN, model=model, entries=PLAN.entries[:3]))
    with pytest.raises(PlanError, match="first of its denoiser"):
        check(replace(PLAN, model=model))
