"""Heads of all layers compete for the prompt's tokens: the best scores of all stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cacheplan.errors import UnsupportedError
from cacheplan.plans.check import check, check_runnable
from cacheplan.plans.io import dumps, loads
from cacheplan.plans.rows import kept_rows
from cacheplan.runtime import PlanCache, apply
from cacheplan.runtime.layer import PlanLayer
from cacheplan.scorers.selection import compete
from cacheplan.types import BestScores, KeyNorm, KVAction, ProbeAttention, Trigger

S = 60
AGAIN = ProbeAttention(content="prompt", tokens=32, reduce="max")
KVZIP = KVAction(keep=0.3, scorer=AGAIN, sinks=2, recent=1)
ONLINE = Trigger(online=BestScores())


@given(
    scores=st.lists(st.lists(st.integers(0, 9), min_size=7, max_size=7), min_size=1, max_size=5),
    share=st.floats(0, 1),
    sure=st.integers(0, 3),
)
def test_the_best_of_all_rows_win(scores: list[list[int]], share: float, sure: int) -> None:
    rows = torch.tensor(scores, dtype=torch.float32)[None]
    first = torch.arange(sure).expand(1, len(scores), sure)
    total = sure * len(scores) + int(share * len(scores) * (7 - sure))
    counts = compete(rows, first, total)[0].tolist()
    assert sum(counts) == total
    claims = sorted(
        (-score, r, s) for r, row in enumerate(scores) for s, score in enumerate(row) if s >= sure
    )
    won = claims[: total - sure * len(scores)]
    assert counts == [sure + sum(claim[1] == r for claim in won) for r in range(len(scores))]


def text(length: int = S, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 97, (1, length), generator=generator)


def test_what_stays_is_the_best_of_all_layers(
    tiny_llama: Any, make_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token that went has a higher score than any that stayed beyond the protected ones."""
    plan = replace(make_plan(KVZIP), trigger=ONLINE)
    assert loads(dumps(plan), "plan.json") == plan
    probed: list[Tensor] = []
    original = PlanLayer.score_probed

    def watched(layer: PlanLayer) -> Any:
        before = {r: layer.rows.keys[layer.rows.row(r)].clone() for r in range(2)}  # type: ignore[union-attr]
        found = original(layer)
        probed.append(torch.stack([found[r].scores for r in range(2)]))
        keys.append(before)
        return found

    keys: list[dict[int, Tensor]] = []
    monkeypatch.setattr(PlanLayer, "score_probed", watched)
    with apply(tiny_llama, plan) as caches, torch.no_grad():
        first = tiny_llama(input_ids=text()).logits
        cache = caches[0]
        assert cache.nbytes == cache.planned_bytes
    assert torch.equal(first, tiny_llama(input_ids=text()).logits)
    scores = torch.stack(probed).view(6, S)
    counts = [n for lengths in cache.lengths for n in lengths]
    assert sum(counts) == int(kept_rows(plan, S).sum())
    assert len(set(counts)) > 1, "heads deserve different parts"
    sure = torch.zeros(S, dtype=torch.bool)
    sure[[0, 1, S - 1]] = True
    stayed, gone = [], []
    for r, count in enumerate(counts):
        rest = scores[r].masked_fill(sure, float("-inf")).argsort(descending=True, stable=True)
        kept = torch.cat([sure.nonzero()[:, 0], rest[: count - 3]]).sort().values
        layer = cache.planned_layers[r // 2]
        assert torch.equal(layer.rows.keys[layer.rows.row(r % 2)], keys[r // 2][r % 2][kept])
        stayed += scores[r, rest[: count - 3]].tolist()
        gone += scores[r, rest[count - 3 : S - 3]].tolist()
    assert min(stayed) >= max(gone)


def test_texts_of_a_batch_compete_alone(tiny_llama: Any, make_plan: Any) -> None:
    plan = replace(make_plan(KVZIP), trigger=ONLINE)
    whole, short = text(seed=4), text(length=41, seed=5)
    ids = torch.cat([whole, torch.cat([torch.zeros(1, S - 41, dtype=torch.long), short], 1)])
    mask = (ids != 0).long()
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    with apply(tiny_llama, plan) as caches, torch.no_grad():
        tiny_llama(input_ids=ids, attention_mask=mask, position_ids=place)
        together = caches[0]
        assert together.nbytes == together.planned_bytes
        for b, own in enumerate((whole, short)):
            tiny_llama(input_ids=own)
            assert [rows[2 * b : 2 * b + 2] for rows in together.lengths] == caches[0].lengths


def test_scores_must_come_from_probes_of_the_whole_prompt(tiny_llama: Any, make_plan: Any) -> None:
    plan = replace(make_plan(replace(KVZIP, scorer=KeyNorm())), trigger=ONLINE)
    check(plan)
    with pytest.raises(UnsupportedError, match=r'scorer.name is "key_norm".*"probe_attention"'):
        check_runnable(plan)
    with (
        pytest.raises(UnsupportedError, match="whole of it at once"),
        apply(tiny_llama, replace(make_plan(KVZIP), trigger=ONLINE), prefill_chunk=8),
    ):
        tiny_llama(input_ids=text())
    assert PlanCache(replace(make_plan(KVZIP), trigger=ONLINE)).nbytes == 0
