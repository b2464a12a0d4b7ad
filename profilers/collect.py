"""Profile a language model: every statistic of one calibration prompt, prompt after prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cacheplan.adapters.attention import AttendingCache, attending
from cacheplan.adapters.images import Images, image_token, read
from cacheplan.adapters.language import readers
from cacheplan.adapters.offloading import input_device
from cacheplan.adapters.probe import continues_at_once
from cacheplan.profilers.divergence import kl_divergence
from cacheplan.profilers.layer_statistics import block_mask
from cacheplan.profilers.observer import (
    Ablation,
    BlockReader,
    LayerRecord,
    Menu,
    Observer,
    hidden_tokens,
)
from cacheplan.profilers.probe_reader import read_probes
from cacheplan.profilers.prompts import Prompt
from cacheplan.profilers.quantization import BitMenu, coarsened
from cacheplan.profilers.replay import replay
from cacheplan.profilers.retrieval import find_needles
from cacheplan.profilers.settings import KVSettings
from cacheplan.profilers.store import ProfileState

Progress = Callable[[int, int, str], None]

_REPLAYED = 8  # ablations that go through the model in one batch
_COARSE = 2  # of the prompts that are ablated, one in so many is by few bits too


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
    bits = None
    if settings.keys:
        bits = BitMenu(
            keys=settings.keys,
            values=settings.values,
            demoted=settings.demoted,
            joint=settings.joint,
        )
    menu = Menu(settings.candidates, settings.keeps, bits)
    with attending(model), torch.no_grad():
        for index in todo:
            ablate = index < settings.ablate
            if progress:
                progress(len(state.done), total, "ablating heads" if ablate else "measuring damage")
            probes = settings.probes if ablate else ()
            coarse = index % _COARSE == 0
            state.add(index, measure(model, prompts[index], menu, probes, coarse=coarse))
            save(state)
    if progress:
        progress(total, total, "done")


def measure(
    model: Any,
    prompt: Prompt,
    menu: Menu,
    probes: Sequence[tuple[int, int]],
    *,
    coarse: bool = True,
) -> dict[str, NDArray[np.float64]]:
    """Measure one prompt; the keys are the statistics of `cacheplan.types.KVProfile`.

    Where heads are ablated, also by few bits if `coarse`.
    """
    C = len(prompt.context)
    ids = torch.tensor([prompt.context + prompt.continuation], device=input_device(model))
    records: dict[int, LayerRecord] = {}
    needles, pictured = find_needles(prompt), None
    token = image_token(model.config)
    if prompt.images is not None and token is not None:
        pictured = ids[0, :C].eq(token)
    stock, shared = DynamicCache(config=model.config).layers, readers(model)
    planned = [index for index, layer in enumerate(stock) if type(layer) is DynamicLayer]
    probed = read_probes(model, ids[:, :C], planned, menu, prompt.images)
    for index in planned:
        stock[index] = Observer(
            C,
            menu,
            needles,
            remember=bool(probes),
            sink=partial(records.__setitem__, index),
            readers=shared[index],
            probed=probed.get(index),
            pictured=pictured,
        )
    read(model, ids, AttendingCache(stock), prompt.images)
    if probes:
        _read_in_blocks(model, ids[:, :C], records, prompt.images)
    found = {
        name: np.stack([records[index].statistics[name] for index in planned])
        for name in records[planned[0]].statistics
    }
    found["context_length"] = np.array(float(C))
    found["continuation_length"] = np.array(float(ids.shape[1] - C))
    if pictured is not None:
        found["image_share"] = np.array(float(pictured.double().mean()))
    if probes:
        found |= _ablate(model, ids, prompt, records, probes, menu.bits if coarse else None)
        damage = found["damage"]
        found["ablation_damage"] = np.stack([damage[:, :, a, g] for a, g in probes], axis=-1)
        if menu.bits is not None and coarse:
            coarsest = found["key_damage"][:, :, -1], found["value_damage"][:, :, -1]
            found["coarse_damage"] = np.stack(coarsest, axis=-1)
    return found


def _read_in_blocks(
    model: Any,
    context: torch.Tensor,
    records: dict[int, LayerRecord],
    images: Images | None,
) -> None:
    """Add the distance between keys of the whole context and of one read in blocks.

    The window is a quarter of the context and the first four tokens are always seen; EpiCache
    takes 4096 and 128 on one long text.
    """
    C = context.shape[1]
    pattern = block_mask(C, window=C // 4, sinks=4, device=context.device)[None]
    layers, shared = DynamicCache(config=model.config).layers, readers(model)
    for index, record in records.items():
        layers[index] = BlockReader(record, pattern, shared[index])
    read(model, context, AttendingCache(layers), images)


def _ablate(
    model: Any,
    ids: torch.Tensor,
    prompt: Prompt,
    records: dict[int, LayerRecord],
    probes: Sequence[tuple[int, int]],
    bits: BitMenu | None,
) -> dict[str, NDArray[np.float64]]:
    """KL of the whole model when one head alone is cut back, or has few bits."""
    context, end = len(prompt.context), ids.shape[1]
    shared, stock = readers(model), DynamicCache(config=model.config)
    if len(records) < len(stock.layers):
        # layers of other kinds replay from where the context has left them
        read(model, ids[:, :context], stock, prompt.images)

    def logits(
        layer: int | None,
        hidden: torch.Tensor | None,
        at_once: int,
        coarse: LayerRecord | None = None,
    ) -> torch.Tensor:
        batch = 1 if hidden is None else hidden.shape[0]
        if coarse is not None and coarse.key is not None:
            batch = coarse.key.shape[0]
        layers: list[Any] = []
        for index, own in enumerate(stock.layers):
            if index in records:
                hides = hidden if index == layer else None
                record = coarse if coarse is not None and index == layer else records[index]
                layers.append(Ablation(record, hides, shared[index]))
            else:
                layers.append(deepcopy(own))
                layers[-1].reorder_cache(torch.zeros(batch, dtype=torch.long))
        return replay(model, prompt, ids, layers, batch=batch, at_once=at_once)

    at_once = end - context if continues_at_once(model) else 1
    reference = logits(None, None, at_once)
    divergences: dict[str, list[NDArray[np.float64]]] = {}
    for layer, record in sorted(records.items()):
        hidden = hidden_tokens(record, probes)
        batches = torch.split(hidden, _REPLAYED)
        kl = torch.cat([kl_divergence(reference, logits(layer, b, at_once)) for b in batches])
        divergences.setdefault("ablation_kl", []).append(kl.view(-1, len(probes)).cpu().numpy())
        if bits is not None:
            assert record.key is not None
            assert record.value is not None
            coarse = zip(*coarsened(record.key, record.value, bits, _REPLAYED), strict=True)
            few = [LayerRecord({}, key=key, value=value) for key, value in coarse]
            found = [kl_divergence(reference, logits(layer, None, at_once, own)) for own in few]
            kl = torch.cat(found).view(-1, 2)
            divergences.setdefault("coarse_kl", []).append(kl.cpu().numpy())
    return {name: np.stack(found) for name, found in divergences.items()}
