"""The nested sets of a rule against the sets it keeps, count by count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.profilers import damage
from cacheplan.scorers.scores import Seen
from cacheplan.scorers.selection import kept_tokens
from cacheplan.types import KVAction, Random

rules = st.fixed_dictionaries(
    {
        "sinks": st.integers(0, 6),
        "recent": st.integers(0, 9),
        "recent_share": st.sampled_from([0.0, 0.3, 0.5, 1.0]),
        "share": st.sampled_from(["head", "layer"]),
        "split": st.sampled_from(["equal", "adaptive"]),
        "floor": st.sampled_from([0.0, 0.2]),
    }
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(rules, st.integers(1, 25), st.data())
def test_nested_sets_are_what_is_kept(rule: dict[str, Any], context: int, data: Any) -> None:
    if rule["split"] == "adaptive":
        rule = rule | {"recent_share": 0.0, "share": "head"}
    action = KVAction(keep=1.0, scorer=Random(seed=0), **rule)
    few = st.lists(st.integers(0, 3), min_size=2 * context, max_size=2 * context)  # with ties
    scores = torch.tensor(data.draw(few), dtype=torch.float32).view(1, 2, context)
    counts = sorted(data.draw(st.sets(st.integers(1, context), min_size=1, max_size=4)))
    text = torch.zeros(1, 2, context, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(damage, "score", lambda *args: scores)
        nested = damage.nested_sets(action, Seen(text, text, text, 1.0), counts)
    for g, count in enumerate(counts):
        for h, kept in enumerate(kept_tokens(scores, [count] * 2, action)):
            assert nested.order[h, : nested.counts[h][g]].sort().values.equal(kept)
