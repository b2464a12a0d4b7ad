"""Profile a language model: every statistic of one calibration prompt, prompt after prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cacheplan.adapters.attention import AttendingCache, attending
from cacheplan.profilers.divergence import kl_divergence
from cacheplan.profilers.observer import Ablation, LayerRecord, Menu, Observer, hidden_tokens
from cacheplan.profilers.prompts import Prompt
from cacheplan.profilers.settings import KVSettings
from cacheplan.profilers.store import ProfileState

Progress = Callable[[int, int, str], None]

_REPLAYED = 8  # ablations that go through the model in one batch


def collect(
    model: Any,
    prompts: Sequence[Prompt],
    state: ProfileState,
    *,
    save: Callable[[ProfileState], None],
    progress: Progress | None = None,
) -> None:
    """Measure the prompts that `state` is responsible for and has not seen yet.

    `save` is called after every prompt, so an interrupted run loses at most one.
    """
    todo = [i for i in state.responsible if i not in state.done]
    settings, total = state.settings, len(state.responsible)
    assert isinstance(settings, KVSettings)
    menu = Menu(settings.candidates, settings.keeps)
    with attending(model), torch.no_grad():
        for index in todo:
            ablate = index < settings.ablate
            if progress:
                progress(len(state.done), total, "ablating heads" if ablate else "measuring damage")
            probes = settings.probes if ablate else ()
            state.add(index, measure(model, prompts[index], menu, probes))
            save(state)
    if progress:
        progress(total, total, "done")


def measure(
    model: Any, prompt: Prompt, menu: Menu, probes: Sequence[tuple[int, int]]
) -> dict[str, NDArray[np.float64]]:
    """Measure one prompt; the keys are the statistics of `cacheplan.types.KVProfile`."""
    C = len(prompt.context)
    ids = torch.tensor([prompt.context + prompt.continuation], device=model.device)
    records: list[LayerRecord] = []
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    cache = AttendingCache(
        [Observer(C, menu, remember=bool(probes), sink=records.append) for _ in range(layers)]
    )
    # the decoder alone: logits of a whole prompt are never made
    model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
    found = {
        "mass_curve": np.stack([record.mass_curve for record in records]),
        "damage": np.stack([record.damage for record in records]),
        "context_length": np.array(float(C)),
        "continuation_length": np.array(float(ids.shape[1] - C)),
    }
    if probes:
        found |= _ablate(model, ids[:, C:], records, probes)
        found["ablation_damage"] = np.stack(
            [np.stack([r.damage[:, a, g] for a, g in probes], axis=-1) for r in records]
        )
    return found


def _ablate(
    model: Any,
    continuation: torch.Tensor,
    records: Sequence[LayerRecord],
    probes: Sequence[tuple[int, int]],
) -> dict[str, NDArray[np.float64]]:
    """KL of the whole model when one head alone is cut back, `[L, K, P]`."""

    def logits(layer: int | None, hidden: torch.Tensor | None) -> torch.Tensor:
        batch = 1 if hidden is None else hidden.shape[0]
        cache = AttendingCache(
            [Ablation(r, hidden if i == layer else None) for i, r in enumerate(records)]
        )
        out = model(input_ids=continuation.expand(batch, -1), past_key_values=cache, use_cache=True)
        return out.logits[:, :-1]  # type: ignore[no-any-return]

    reference = logits(None, None)
    divergences = []
    for layer, record in enumerate(records):
        hidden = hidden_tokens(record, probes)
        batches = torch.split(hidden, _REPLAYED)
        kl = torch.cat([kl_divergence(reference, logits(layer, batch)) for batch in batches])
        divergences.append(kl.view(-1, len(probes)).cpu().numpy())
    return {"ablation_kl": np.stack(divergences)}
