"""What merging, probes and triggers may say in a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cacheplan.errors import PlanError
from cacheplan.plans.check import check, kv_only
from cacheplan.plans.io import dumps, loads, read_plan
from cacheplan.types import KVAction, Merge, Preference, ProbeAttention, Trigger

PLAN = kv_only(read_plan(Path(__file__).with_name("golden_plan.json")), "test")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"scorer": ProbeAttention(content="answer")},
            'entries[0].action.scorer.content is "answer", expected one of filler, prompt',
        ),
        (
            {"scorer": ProbeAttention(reduce="mean")},
            'entries[0].action.scorer.reduce is "mean", expected one of sum, max',
        ),
        (
            {"scorer": ProbeAttention(tokens=0)},
            "entries[0].action.scorer.tokens is 0, expected an integer of at least 1",
        ),
        (
            {"scorer": ProbeAttention(pool=2)},
            "entries[0].action.scorer.pool is 2, expected an odd integer of at least 1",
        ),
        (
            {"scorer": ProbeAttention(tokens=2, ids=(3, -4))},
            "entries[0].action.scorer.ids is [3, -4], expected token ids of at least 0",
        ),
        (
            {"scorer": ProbeAttention(ids=(3, 4))},
            "entries[0].action.scorer.tokens is 32, expected the number of ids, 2",
        ),
        (
            {"losers": "merge"},
            'entries[0].action.merge is null, expected an object where losers is "merge"',
        ),
        (
            {"merge": Merge()},
            'entries[0].action.merge is "given", expected none where losers is "evict"',
        ),
        (
            {"losers": "merge", "merge": Merge(to="best")},
            'entries[0].action.merge.to is "best", expected one of nearest, similar',
        ),
        (
            {"losers": "merge", "merge": Merge(sigma="one")},
            'entries[0].action.merge.sigma is "one", expected one of distance, weights',
        ),
        (
            {"losers": "merge", "merge": Merge(similarity=1.5)},
            "entries[0].action.merge.similarity is 1.5, expected a number from -1 to 1",
        ),
    ],
)
def test_cells_that_contradict_themselves(changes: dict[str, Any], sentence: str) -> None:
    entry = PLAN.entries[0]
    changed = replace(entry, action=replace(entry.action, **changes))
    with pytest.raises(PlanError) as caught:
        check(replace(PLAN, entries=(changed, *PLAN.entries[1:])))
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("trigger", "sentence"),
    [
        (Trigger(prefill_chunk=0), "trigger.prefill_chunk is 0, expected an integer of at least 1"),
        (
            Trigger(online=Preference(tau_dispersion=0.0)),
            "trigger.online.tau_dispersion is 0.0, expected a number above 0",
        ),
        (
            Trigger(online=Preference(tau_shift=-1.0)),
            "trigger.online.tau_shift is -1.0, expected a number above 0",
        ),
    ],
)
def test_triggers_that_make_no_sense(trigger: Trigger, sentence: str) -> None:
    with pytest.raises(PlanError) as caught:
        check(replace(PLAN, trigger=trigger))
    assert str(caught.value) == sentence


def test_the_cells_go_through_a_file() -> None:
    entry, *others = PLAN.entries
    assert isinstance(entry.action, KVAction)
    probe = ProbeAttention(content="prompt", ids=(7, 8), reduce="max", pool=3)
    action = replace(entry.action, scorer=probe, losers="merge", merge=Merge(to="similar"))
    plan = replace(
        PLAN,
        entries=(replace(entry, action=action), *others),
        trigger=Trigger(prefill_chunk=512, online=Preference(tau_shift=0.5)),
    )
    assert loads(dumps(plan), "plan.json") == plan
