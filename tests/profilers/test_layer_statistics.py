"""Statistics of layers and heads against their definitions written out."""

from __future__ import annotations

import pytest
import scipy.fft
import torch

from cacheplan.profilers.damage import eviction_damage, kept_counts, nested_sets
from cacheplan.profilers.layer_statistics import (
    PASSBAND,
    block_mask,
    key_distance,
    output_energy,
    spectral_residual,
)
from cacheplan.profilers.prompts import Prompt
from cacheplan.profilers.retrieval import find_needles, retrieval_score
from cacheplan.scorers.preference import window_dispersion_and_shift
from cacheplan.scorers.scores import Seen
from cacheplan.types import KVAction

K, G, S, D = 2, 2, 50, 8
QUERY, KEY, VALUE = torch.randn(1, K * G, S, D), torch.randn(1, K, S, D), torch.randn(1, K, S, D)
LOGITS = QUERY @ KEY.repeat_interleave(G, 1).transpose(-1, -2) * 0.5
WEIGHTS = LOGITS.masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def test_dispersion_and_shift_of_the_window() -> None:
    dispersion, shift = window_dispersion_and_shift(Seen(QUERY, KEY, VALUE, 0.5))
    window = S // 2  # 32 would leave fewer tokens before the window than in it
    early = WEIGHTS[0, :, -window:, :-window].double()
    expected = -sum(float(row @ (row + 1e-10).log()) for head in early for row in head)
    assert dispersion == pytest.approx(expected / (K * G * window), rel=1e-5)
    variance = sum(float(column.var()) for head in early for column in head.T)
    assert shift == pytest.approx(variance / (K * G), rel=1e-5)


def test_even_attention_is_most_dispersed_and_hardly_shifts() -> None:
    even, even_shift = window_dispersion_and_shift(Seen(QUERY, KEY, VALUE, 0.0))
    sharp, shift = window_dispersion_and_shift(Seen(QUERY, KEY, VALUE, 5.0))
    assert even > sharp > 0
    assert even_shift < 1e-3 < shift


def test_spectral_residual_is_the_energy_of_high_cosines() -> None:
    expected = 0.0
    for x in (KEY, VALUE):
        cosines = scipy.fft.dct(x.double().numpy(), axis=2, norm="ortho")
        expected += (cosines[:, :, int(PASSBAND * S) + 1 :] ** 2).sum() / (cosines**2).sum()
    assert spectral_residual(KEY, VALUE) == pytest.approx(expected, rel=1e-5)
    flat = torch.ones_like(KEY)
    assert spectral_residual(flat, flat) == pytest.approx(0, abs=1e-9)


def test_output_energy_is_the_damage_of_losing_the_output() -> None:
    """With values only in the context and nothing of it kept, all of the output is lost."""
    C, T = 40, S - 40
    value = VALUE.clone()
    value[:, :, C:] = 0
    output = WEIGHTS[:, :, C:] @ value.repeat_interleave(G, 1)
    energy = output_energy(output.transpose(1, 2), K)
    seen = Seen(QUERY[:, :, :C], KEY[:, :, :C], value[:, :, :C], 0.5)
    sets = nested_sets(KVAction(keep=1.0), seen, kept_counts([1.0], C))
    for counts in sets.counts:
        counts[0] = 0
    damage = eviction_damage(QUERY[:, :, C:], KEY, value, [sets], scale=0.5)[:, 0, 0]
    assert energy.tolist() == pytest.approx(damage.tolist(), rel=1e-5)
    assert output.shape[2] == T


def test_blocks_see_their_half_the_one_before_and_the_sinks() -> None:
    mask = block_mask(12, window=6, sinks=2, device=torch.device("cpu"))
    for i in range(12):
        seen = {j for j in range(i + 1) if j < 2 or j // 3 >= i // 3 - 1}
        assert set(mask[i].nonzero()[:, 0].tolist()) == seen


def test_key_distance_is_one_minus_the_cosine() -> None:
    assert key_distance(KEY, 3 * KEY) == pytest.approx(0, abs=1e-12)
    assert key_distance(KEY, -KEY) == pytest.approx(2)
    turned = torch.stack([-KEY[..., 1], KEY[..., 0]], -1)
    assert key_distance(KEY[..., :2], turned) == pytest.approx(1)


PROMPT = Prompt(
    context=(*range(100, 130), 7, 8, 100, 7, 8),
    continuation=(1, 2, 7, 8, 3, 9, 4),
    answers=((2, 4), (5, 6)),  # "7 8" occurs twice, "9" nowhere
)


def test_needles_are_all_occurrences_of_an_answer() -> None:
    needles = find_needles(PROMPT)
    assert needles is not None
    C = len(PROMPT.context)
    assert needles.rows.tolist() == [C + 1, C + 2]  # the queries that predict 7 and 8
    for hay in needles.hay:
        assert hay.nonzero()[:, 0].tolist() == [30, 31, 33, 34]


def test_prompts_without_answers_in_the_context_have_no_needles() -> None:
    assert find_needles(Prompt((1, 2, 3), (9, 9), ((0, 1),))) is None
    assert find_needles(Prompt((1, 2, 3), (1, 2))) is None
    assert find_needles(Prompt((1,), (1, 2), ((0, 2),))) is None


def test_retrieval_score_is_the_mass_on_the_needles() -> None:
    needles = find_needles(PROMPT)
    assert needles is not None
    total = len(PROMPT.context) + len(PROMPT.continuation)
    found = retrieval_score(QUERY[:, :, :total], KEY[:, :, :total], needles, scale=0.5)
    expected = WEIGHTS[0][:, needles.rows][:, :, [30, 31, 33, 34]].sum(-1).mean(-1)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
