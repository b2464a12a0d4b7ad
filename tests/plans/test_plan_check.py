from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cacheplan.errors import ModelMismatchError, PlanError, UnsupportedError
from cacheplan.plans.check import check, check_model, check_runnable, kv_only
from cacheplan.plans.io import read_plan
from cacheplan.types import (
    Action,
    Damage,
    Entry,
    ExpectedAttention,
    KVAction,
    KVPlan,
    LagDifference,
    LowPassResidual,
    Position,
    Precision,
    Site,
    Tier,
    Trigger,
    WeightAction,
    WindowAttention,
)

# Three layers of two kv heads; only layer 1 has one entry for both.
PLAN = kv_only(read_plan(Path(__file__).with_name("golden_plan.json")), "test")
Change = Callable[[], KVPlan]


def part(name: str, **changes: Any) -> Change:
    return lambda: replace(PLAN, **{name: replace(getattr(PLAN, name), **changes)})


def action(index: int, **changes: Any) -> Change:
    entry = PLAN.entries[index]
    return put(index, replace(entry, action=replace(entry.action, **changes)))


def site(index: int, **changes: Any) -> Change:
    entry = PLAN.entries[index]
    return put(index, replace(entry, site=replace(entry.site, **changes)))


def put(index: int, *entries: Entry) -> Change:
    """The plan with these entries instead of the one at `index`."""
    before, after = PLAN.entries[:index], PLAN.entries[index + 1 :]
    return lambda: replace(PLAN, entries=before + entries + after)


def other(target: str, action: Action, **place: int) -> Change:
    """The plan with an entry that is not for the kv cache in front of the others."""
    entry = Entry(site=Site(layer=0, target=target, **place), action=action)
    return lambda: replace(PLAN, entries=(entry, *PLAN.entries))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (part("model", layer_kinds=()), "model.layer_kinds is [], expected at least one layer"),
        (part("model", kv_heads=0), "model.kv_heads is 0, expected an integer of at least 1"),
        (
            part("budget", kept=0.0, reached=0.0),
            "budget.kept is 0.0, expected a number above 0 and at most 1",
        ),
        (
            part("budget", kept=1.5),
            "budget.kept is 1.5, expected a number above 0 and at most 1",
        ),
        (
            part("budget", reached=0.40001),
            "budget.reached is 0.40001, expected a number from 0 to the budget 0.4",
        ),
        (
            part("budget", reached=-0.1),
            "budget.reached is -0.1, expected a number from 0 to the budget 0.4",
        ),
        (part("budget", length=0), "budget.length is 0, expected an integer of at least 1"),
        (part("budget", length=None), "budget.length is null, expected an integer of at least 1"),
        (part("budget", max_rows=0), "budget.max_rows is 0, expected an integer of at least 1"),
        (
            part("trigger", decode_every=0),
            "trigger.decode_every is 0, expected an integer of at least 1",
        ),
        (
            part("certificate", gap=-0.1),
            "certificate.gap is -0.1, expected a number of at least 0",
        ),
        (part("predicted", kl=-0.1), "predicted.kl is -0.1, expected a number of at least 0"),
        (part("measured", full_nll=-1.0), "measured.full_nll is -1.0, expected a number of"),
        (part("measured", recall=1.1), "measured.recall is 1.1, expected a number from 0 to 1"),
        (
            part("measured", prompts=-1),
            "measured.prompts is -1, expected an integer of at least 0",
        ),
        (
            action(0, keep=0.0),
            "entries[0].action.keep is 0.0, expected a number above 0 and at most 1",
        ),
        (
            action(4, keep=1.01),
            "entries[4].action.keep is 1.01, expected a number above 0 and at most 1",
        ),
        (action(0, keep=float("nan")), "entries[0].action.keep is NaN, expected a number above 0"),
        (action(0, sinks=-1), "entries[0].action.sinks is -1, expected an integer of at least 0"),
        (action(0, recent=-1), "entries[0].action.recent is -1, expected an integer of at least"),
        (
            action(0, recent_share=1.5),
            "entries[0].action.recent_share is 1.5, expected a number from 0 to 1",
        ),
        (action(2, floor=-0.5), "entries[2].action.floor is -0.5, expected a number from 0 to 1"),
        (action(0, share="all"), 'entries[0].action.share is "all", expected one of head, layer'),
        (
            action(0, split="none"),
            'entries[0].action.split is "none", expected one of equal, adaptive',
        ),
        (
            action(0, losers="drop"),
            'entries[0].action.losers is "drop", expected one of evict, merge, demote, offload',
        ),
        (
            action(0, share="layer"),
            'entries[0].action.share is "layer", expected "head" in an entry for one head',
        ),
        (
            action(0, split="adaptive"),
            'entries[0].action.split is "adaptive", expected "equal" in an entry for one head',
        ),
        (
            action(2, share="layer"),
            'entries[2].action.share is "layer", expected "head" where split is adaptive',
        ),
        (action(0, rank=0), "entries[0].action.rank is 0, expected an integer of at least 1"),
        (
            action(0, scorer=WindowAttention(window=0)),
            "entries[0].action.scorer.window is 0, expected an integer of at least 1",
        ),
        (
            action(0, scorer=WindowAttention(pool=4)),
            "entries[0].action.scorer.pool is 4, expected an odd integer of at least 1",
        ),
        (
            action(0, scorer=WindowAttention(pooling="min")),
            'entries[0].action.scorer.pooling is "min", expected one of average, max',
        ),
        (
            action(0, scorer=WindowAttention(variance=-1.0)),
            "entries[0].action.scorer.variance is -1.0, expected a number of at least 0",
        ),
        (
            action(2, scorer=WindowAttention(heads=(1, 0)), split="equal", share="layer"),
            "entries[2].action.scorer.heads is [1, 0], expected ascending query heads from 0",
        ),
        (
            action(2, scorer=WindowAttention(heads=(0, 99)), split="equal", share="layer"),
            "entries[2].action.scorer.heads is [0, 99], expected ascending query heads from 0",
        ),
        (
            action(2, scorer=WindowAttention(heads=(0, 1))),
            "entries[2].action.scorer.heads is [0, 1], "
            'expected none unless action.share is "layer"',
        ),
        (
            action(0, scorer=ExpectedAttention(future=0)),
            "entries[0].action.scorer.future is 0, expected an integer of at least 1",
        ),
        (
            action(0, scorer=ExpectedAttention(epsilon=-0.1)),
            "entries[0].action.scorer.epsilon is -0.1, expected a number of at least 0",
        ),
        (
            action(0, scorer=LagDifference(lag=0)),
            "entries[0].action.scorer.lag is 0, expected an integer of at least 1",
        ),
        (
            action(0, scorer=LowPassResidual(passband=1.5)),
            "entries[0].action.scorer.passband is 1.5, expected a number from 0 to 1",
        ),
        (
            action(0, key=Precision(format="nf4")),
            'entries[0].action.key.format is "nf4", expected one of model, int, float',
        ),
        (
            action(0, value=Precision(bits=0)),
            "entries[0].action.value.bits is 0, expected an integer from 1 to 32",
        ),
        (
            action(0, value=Precision(axis="row")),
            'entries[0].action.value.axis is "row", expected one of tensor, token, channel',
        ),
        (
            action(0, value=Precision(group=0)),
            "entries[0].action.value.group is 0, expected an integer of at least 1",
        ),
        (
            action(0, value=Precision(residual=-1)),
            "entries[0].action.value.residual is -1, expected an integer of at least 0",
        ),
        (
            other("weight", WeightAction(weight=Precision(bits=64))),
            "entries[0].action.weight.bits is 64, expected an integer from 1 to 32",
        ),
        (site(0, target="bias"), 'entries[0].site.target is "bias", expected one of kv, weight'),
        (site(0, layer=3), "entries[0].site.layer is 3, expected an integer from 0 below 3"),
        (site(0, head=-1), "entries[0].site.head is -1, expected an integer from 0 below 2"),
        (
            site(0, target="weight"),
            'entries[0].site.target is "weight", expected the kind of its action',
        ),
        (
            lambda: replace(PLAN, entries=PLAN.entries[::-1]),
            "entries[1] is kv of layer 2 head 0 after kv of layer 2 head 1, "
            "expected each site once, sorted by layer, target and head",
        ),
        (
            put(2, PLAN.entries[2], PLAN.entries[2]),
            "entries[3] is kv of layer 1 after kv of layer 1, "
            "expected each site once, sorted by layer, target and head",
        ),
        (
            part("model", layer_kinds=("sliding_attention", "full_attention", "full_attention")),
            "entries[0] names layer 0, whose kind is sliding_attention, "
            "expected a layer of full_attention",
        ),
        (put(1), "entries name 1 kv heads of layer 0, expected all 2 of them"),
        (put(2), "entries name 0 kv heads of layer 1, expected all 2 of them"),
        (
            put(
                2,
                PLAN.entries[2],
                Entry(site=Site(layer=1, head=1), action=KVAction(keep=0.5)),
            ),
            "entries name layer 1 as a whole and head 1 of it, "
            "expected either all heads at once or each on its own",
        ),
    ],
)
def test_check_refuses(change: Change, sentence: str) -> None:
    with pytest.raises(PlanError) as caught:
        check(change())
    assert str(caught.value).startswith(sentence)


def test_check_accepts_every_kind_of_entry() -> None:
    check(PLAN)
    weight = Entry(site=Site(layer=0, target="weight"), action=WeightAction())
    check(replace(PLAN, entries=(*PLAN.entries[:2], weight, *PLAN.entries[2:])))
    check(replace(PLAN, predicted=None, measured=Damage(kl=0.0)))


def test_a_model_of_absurd_size_is_refused_quickly() -> None:
    with pytest.raises(PlanError, match="expected all 1000000000000 of them"):
        check(part("model", kv_heads=10**12)())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            other("weight", WeightAction()),
            'entries[0].site.target is "weight", which cannot be run yet; supported is "kv"',
        ),
        (
            action(1, losers="offload"),
            'entries[1].action.losers is "offload", which cannot be run yet; supported is "evict", '
            '"merge" and "demote"',
        ),
        (
            action(1, losers="demote", low=Tier(key=Precision(), value=Precision())),
            'entries[1].action.low.key.format is "model", which cannot be run yet; '
            'supported is "int" or "float" for what is demoted',
        ),
        (
            action(1, key=Precision(format="int", bits=3)),
            "entries[1].action.key.bits is 3, which cannot be run yet; supported is 2, 4 or 8",
        ),
        (
            action(1, key=Precision(format="int", bits=4, axis="channel", group=48)),
            "entries[1].action.key.group is 48, which cannot be run yet; "
            "supported is a divisor or multiple of 64 tokens",
        ),
        (
            action(1, value=Precision(format="int", bits=4, axis="channel", group=32)),
            'entries[1].action.value.axis is "channel", which cannot be run yet; '
            'supported is "token" for values',
        ),
        (
            action(1, value=Precision(format="float", bits=16)),
            "entries[1].action.value.bits is 16, which cannot be run yet; supported is 8 for float",
        ),
        (
            lambda: replace(
                action(0, scorer=Position(), value=Precision(format="int", bits=4))(),
                trigger=Trigger(decode_every=1),
            ),
            "entries[0].action.key.bits and value.bits is [16, 4], which cannot be run yet; "
            "supported is 16 each where trigger.decode_every is set",
        ),
        (
            action(1, rank=8),
            "entries[1].action.rank is 8, which cannot be run yet; supported is none",
        ),
        (
            part("trigger", decode_every=32),
            "entries[0].action.scorer.window is 32, which cannot be run yet; "
            "supported is 1, or another scorer, where trigger.decode_every is set",
        ),
    ],
)
def test_check_runnable_refuses(change: Change, sentence: str) -> None:
    plan = change()
    with pytest.raises(UnsupportedError) as caught:
        check_runnable(plan)
    assert str(caught.value).startswith(sentence)


def test_check_runnable_accepts_what_is_supported() -> None:
    check_runnable(PLAN)
    entries = tuple(
        replace(entry, action=KVAction(keep=0.5, scorer=Position())) for entry in PLAN.entries
    )
    check_runnable(replace(PLAN, entries=entries, trigger=Trigger(decode_every=1)))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {"architecture": "QwenForCausalLM", "kv_heads": 4},
            "whose architecture is LlamaForCausalLM, but that of small is QwenForCausalLM",
        ),
        (
            {"layer_kinds": ("full_attention",) * 2},
            "whose number of layers is 3, but that of small is 2",
        ),
        (
            {"layer_kinds": ("full_attention", "sliding_attention", "full_attention")},
            "whose kind of layer 1 is full_attention, but that of small is sliding_attention",
        ),
        ({"kv_heads": 4}, "whose number of kv heads is 2, but that of small is 4"),
        ({"query_heads": 8}, "whose number of query heads is 4, but that of small is 8"),
        ({"key_width": 8}, "whose key width is 16, but that of small is 8"),
        ({"value_width": 8}, "whose value width is 16, but that of small is 8"),
        (
            {"rope": "{}"},
            'whose rotary embedding is {"rope_theta":10000.0,"rope_type":"default"}, '
            "but that of small is {}",
        ),
        (
            {"digest": "sha256:0"},
            f"whose digest of configuration and weights is {PLAN.model.digest}, "
            "but that of small is sha256:0",
        ),
    ],
)
def test_check_model_refuses(changes: dict[str, Any], difference: str) -> None:
    with pytest.raises(ModelMismatchError) as caught:
        check_model(PLAN, replace(PLAN.model, id="small", **changes))
    assert str(caught.value) == (
        f"the plan was made for recall-demo, {difference}; "
        "load the plan's model or profile small and solve again"
    )


def test_a_model_may_go_by_another_name() -> None:
    check_model(PLAN, replace(PLAN.model, id="elsewhere/recall-demo"))
