from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cacheplan.errors import InfeasibleError
from cacheplan.plans.check import check, kv_only
from cacheplan.plans.io import read_plan
from cacheplan.plans.rows import (
    SLACK,
    cache_bytes,
    full_bytes,
    kept_rows,
    row_bytes,
    rows_after,
)
from cacheplan.types import (
    AccumulatedAttention,
    Entry,
    KVAction,
    KVPlan,
    Merge,
    Position,
    Scorer,
    Site,
    Trigger,
)

BASE = kv_only(read_plan(Path(__file__).with_name("golden_plan.json")), "test")
Keeps = list[float | list[float]]


def make(
    keeps: Keeps,
    *,
    max_rows: int | None = None,
    every: int | None = None,
    scorer: Scorer | None = None,
) -> KVPlan:
    """Two kv heads of width 16; a layer keeps one fraction for both heads or a list."""
    entries = []
    for layer, keep in enumerate(keeps):
        for head, fraction in enumerate(keep) if isinstance(keep, list) else [(None, keep)]:
            action = KVAction(keep=fraction, scorer=scorer or Position())
            entries.append(Entry(site=Site(layer=layer, head=head), action=action))
    plan = replace(
        BASE,
        model=replace(BASE.model, layer_kinds=("full_attention",) * len(keeps)),
        budget=replace(BASE.budget, max_rows=max_rows),
        entries=tuple(entries),
        trigger=Trigger(decode_every=every),
    )
    check(plan)
    return plan


@pytest.mark.parametrize(
    ("keeps", "max_rows", "expected"),
    [
        # Targets 5, 2.5, 7.5, 5: the lower index of equal remainders gets the last row.
        ([[0.5, 0.25], [0.75, 0.5]], None, [[5, 3], [7, 5]]),
        # Scaled to 10 rows: 2.5, 1.25, 3.75, 2.5.
        ([[0.5, 0.25], [0.75, 0.5]], 10, [[3, 1], [4, 2]]),
        ([[0.5, 0.25], [0.75, 0.5]], 21, [[5, 3], [7, 5]]),
        # Whole layers: one row is left of 15, but a token of layer 1 costs two.
        ([0.5, 0.25], None, [[5, 5], [2, 2]]),
        # Both kinds: the row that layer 0 cannot use goes to a head.
        ([0.35, [0.3, 0.25]], None, [[3, 3], [3, 3]]),
        # 0.2 and 0.2 become 1; 9 and 5 share the other 12 rows of 14: 7.71 and 4.29.
        ([[0.9, 0.02], [0.02, 0.5]], None, [[8, 1], [1, 4]]),
        # 0.29 * 10 falls just short of 2.9 in binary.
        ([[0.29, 0.29], [0.29, 0.13]], None, [[3, 3], [3, 1]]),
        ([1.0, [1.0, 1.0]], None, [[10, 10], [10, 10]]),
        ([1.0, [1.0, 1.0]], 4, [[1, 1], [1, 1]]),
    ],
)
def test_kept_rows_of_ten_tokens(
    keeps: Keeps, max_rows: int | None, expected: list[list[int]]
) -> None:
    rows = kept_rows(make(keeps, max_rows=max_rows), 10)
    assert rows.dtype == np.int64
    assert rows.tolist() == expected


def test_an_even_plan_stays_even_where_binary_fractions_fall_short() -> None:
    assert 0.29 * 100 < 29
    assert (kept_rows(make([[0.29, 0.29]] * 8), 100) == 29).all()
    assert (kept_rows(make([0.29] * 8), 100) == 29).all()


def test_too_short_a_prompt_is_told_the_shortest() -> None:
    plan = make([[0.1, 0.1], 0.1])
    with pytest.raises(InfeasibleError) as caught:
        kept_rows(plan, 9)
    assert str(caught.value) == (
        "the plan keeps too little of a prompt of 9 tokens to leave each head one; "
        "give it at least 10 tokens or solve again with a larger budget"
    )
    assert (kept_rows(plan, 10) == 1).all()


def test_too_few_rows_are_told() -> None:
    with pytest.raises(InfeasibleError) as caught:
        kept_rows(make([0.5, 0.5], max_rows=3), 100)
    assert str(caught.value) == (
        "the budget 0.4 leaves 3 rows to 4 heads, expected one each; "
        "solve again for at least 4 rows"
    )


fractions = st.floats(0.001, 1)
by_head = st.lists(st.lists(fractions, min_size=2, max_size=2), min_size=1, max_size=6)
by_layer = st.lists(fractions, min_size=1, max_size=6)
mixed = st.lists(fractions | st.lists(fractions, min_size=2, max_size=2), min_size=1, max_size=6)
limits = st.none() | st.integers(1, 3000)
lengths = st.integers(1, 1000)
quick = settings(derandomize=True, deadline=None, max_examples=150)


@quick
@given(mixed, limits, lengths)
def test_rows_fit_the_budget_and_the_prompt(
    keeps: Keeps, max_rows: int | None, length: int
) -> None:
    plan = make(keeps, max_rows=max_rows)
    flat = [k for keep in keeps for k in (keep if isinstance(keep, list) else [keep, keep])]
    asked = math.floor(math.fsum(k * length for k in flat) + 1e-9)
    total = asked if max_rows is None else min(asked, max_rows)
    try:
        rows = kept_rows(plan, length)
    except InfeasibleError as error:
        assert total < len(flat)
        if "tokens" in str(error):
            shortest = int(str(error).split("at least ")[1].split()[0])
            assert kept_rows(plan, shortest).min() == 1
            with pytest.raises(InfeasibleError):
                kept_rows(plan, shortest - 1)
        return
    assert rows.min() >= 1
    assert rows.max() <= length
    together = [not isinstance(keep, list) for keep in keeps]
    assert (rows[together, 0] == rows[together, 1]).all()
    assert 0 <= total - rows.sum() <= any(together)  # one row is no token for two heads


@quick
@given(by_head | by_layer, limits, lengths)
def test_the_total_grows_with_the_prompt(keeps: Keeps, max_rows: int | None, length: int) -> None:
    plan = make(keeps, max_rows=max_rows)
    try:
        before = kept_rows(plan, length)
    except InfeasibleError:
        return
    for longer in (length + 1, 2 * length):
        assert kept_rows(plan, longer).sum() >= before.sum()


@quick
@given(by_head, st.randoms(use_true_random=False), st.integers(1000, 2000))
def test_permuted_layers_give_permuted_rows(
    keeps: list[list[float]], random: Random, length: int
) -> None:
    remainders = [keep * length % 1 for layer in keeps for keep in layer]
    assume(len(set(remainders)) == len(remainders))  # ties go by position
    order = list(range(len(keeps)))
    random.shuffle(order)
    rows = kept_rows(make([*keeps]), length)
    permuted = kept_rows(make([keeps[i] for i in order]), length)
    assert (permuted == rows[order]).all()
    targets = np.array(keeps) * length
    assert (abs(rows - targets) < 1).all()


@pytest.mark.parametrize(
    ("every", "max_rows", "generated", "expected"),
    [
        (None, None, 0, 5),
        (None, None, 7, 12),
        (4, None, 3, 8),
        (4, None, 4, 7),  # half of 14
        (4, None, 6, 9),
        (4, None, 8, 9),  # half of 18
        (4, 20, 3, 8),
        (4, 20, 4, 5),
    ],
)
def test_rows_after(every: int | None, max_rows: int | None, generated: int, expected: int) -> None:
    plan = make([0.5, [0.5, 0.5]], every=every, max_rows=max_rows)
    assert rows_after(plan, 10, generated).tolist() == [[expected] * 2] * 2


def test_a_head_never_holds_more_than_there_is() -> None:
    plan = make([1.0, [1.0, 0.1]], every=3)
    assert rows_after(plan, 10, 7).tolist() == [[17, 17], [17, 2]]


def test_row_bytes() -> None:
    spec = replace(BASE.model, key_width=16, value_width=8)
    plain, sums = KVAction(keep=0.5), KVAction(keep=0.5, scorer=AccumulatedAttention())
    counted = replace(plain, losers="merge", merge=Merge())
    uncounted = replace(plain, losers="merge", merge=Merge(count_bias=False))
    for actions, every, expected in (
        ([plain], None, 48),
        ([plain], 4, 48),
        ([sums], None, 48),
        ([sums], 4, 52),
        ([plain, counted], None, 52),
        ([uncounted], None, 48),
        ([sums, counted], 4, 56),
    ):
        assert row_bytes(actions, spec, 2, Trigger(decode_every=every)) == expected


@pytest.mark.parametrize(
    ("every", "generated", "tokens"),
    [
        (None, 0, 5),
        (None, 1, 5 + SLACK),
        (None, 64, 5 + SLACK),
        (None, 65, 5 + 2 * SLACK),
        (4, 4, 7),
        (4, 5, 7 + SLACK),
    ],
)
def test_cache_bytes(every: int | None, generated: int, tokens: int) -> None:
    for scorer, state in ((Position(), 0), (AccumulatedAttention(), 0 if every is None else 4)):
        plan = make([0.5, [0.5, 0.5]], every=every, scorer=scorer)
        assert cache_bytes(plan, 10, 2, generated) == 4 * tokens * (32 * 2 + state)


def test_keeping_everything_costs_the_full_cache() -> None:
    assert full_bytes(BASE.model, 10, 2) == 3 * 2 * 10 * 32 * 2
    assert cache_bytes(make([1.0, 1.0, 1.0]), 10, 2) == full_bytes(BASE.model, 10, 2)
