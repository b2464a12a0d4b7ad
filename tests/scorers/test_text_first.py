"""The text prior: all text before any image, and both in the order of their scores."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cacheplan.scorers.selection import kept_tokens, text_first
from cacheplan.types import KeyNorm, KVAction

S = 12
numbers = st.floats(-1e3, 1e3, width=32) | st.sampled_from([float("inf"), float("-inf"), 1e-7])


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    values=arrays("float32", (2, S), elements=numbers),
    images=arrays("bool", S),
    count=st.integers(1, S),
    recent=st.integers(0, 3),
    sinks=st.integers(0, 3),
)
def test_text_first(values: object, images: object, count: int, recent: int, sinks: int) -> None:
    scores, pictured = torch.tensor(values)[None], torch.tensor(images)[None]
    action = KVAction(keep=1.0, scorer=KeyNorm(), recent=recent, sinks=sinks, protect_text=True)
    kept = kept_tokens(scores, [count] * 2, action, pictured)
    for h, tokens in enumerate(kept):
        assert len(tokens) == count
        stays = torch.zeros(S, dtype=torch.bool)
        stays[tokens] = True
        protected = torch.zeros(S, dtype=torch.bool)
        protected[S - min(recent, count) :] = min(recent, count) > 0
        protected[: min(sinks, max(0, count - recent))] = True
        chosen, lost = stays & ~protected, ~stays
        if (chosen & pictured[0]).any():
            assert not (lost & ~pictured[0]).any(), "an image token stays only once all text does"
        for kind in (pictured[0], ~pictured[0]):
            if (chosen & kind).any() and (lost & kind).any():
                assert scores[0, h, chosen & kind].min() >= scores[0, h, lost & kind].max()


def test_small_scores_survive_the_shift() -> None:
    scores = torch.tensor([[[1e-9, 3e-9, 2e-9, 0.5]]])
    lifted = text_first(scores, torch.tensor([[True, True, True, False]]))
    assert lifted[0, 0].argsort(descending=True).tolist() == [3, 1, 2, 0]


def test_texts_without_images_are_left_alone() -> None:
    scores, action = torch.rand(1, 2, S), KVAction(keep=1.0, scorer=KeyNorm(), protect_text=True)
    plain = kept_tokens(scores, [5, 5], KVAction(keep=1.0, scorer=KeyNorm()))
    for images in (None, torch.zeros(1, S, dtype=torch.bool), torch.ones(1, S, dtype=torch.bool)):
        for own, other in zip(kept_tokens(scores, [5, 5], action, images), plain, strict=True):
            assert torch.equal(own, other)
