"""The cache that follows a plan, for `past_key_values`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from cacheplan.adapters.attention import AttendingCache
from cacheplan.adapters.language import readers
from cacheplan.adapters.probe_tokens import read_probe
from cacheplan.errors import UnsupportedError
from cacheplan.plans.check import check_runnable
from cacheplan.plans.rows import cache_bytes
from cacheplan.runtime.competition import best_of_all
from cacheplan.runtime.layer import Course, PlanLayer
from cacheplan.runtime.mixed import MixedRows
from cacheplan.types import BestScores, KVPlan, ProbeAttention, Site


class PlanCache(AttendingCache):
    """A transformers `Cache` that follows a plan, for one batch of texts.

    Pass it as `past_key_values`, inside `apply(model, plan)`.  The first forward call on an
    empty cache is the prompt; its attention sees every token, then the plan evicts, so the
    first generated token is that of the full cache.  Texts of a batch may differ in length:
    padding is told by the attention mask, never stored, and each text keeps the plan's share of
    its own length.
    """

    def __init__(self, plan: KVPlan, model: Any = None) -> None:
        """Make an empty cache; `model` is needed where some layers are not planned.

        Raises UnsupportedError if the runtime cannot follow the plan.
        """
        check_runnable(plan)
        self.plan = plan
        self._course = Course(plan)
        spec = plan.model
        if model is None:
            if len(spec.planned) < spec.layers:
                raise UnsupportedError(
                    f"{spec.architecture} has layers that are not planned and keep transformers' "
                    "own cache: write PlanCache(plan, model)."
                )
            layers: list[Any] = [PlanLayer(self._course, index) for index in spec.planned]
        else:
            shared = readers(model)
            layers = list(DynamicCache(config=model.config).layers)
            for index in spec.planned:
                layers[index] = PlanLayer(self._course, index, shared[index])
        super().__init__(layers)

    @property
    def planned_layers(self) -> list[PlanLayer]:
        return [layer for layer in self.layers if isinstance(layer, PlanLayer)]

    @property
    def lengths(self) -> list[list[int]]:
        """Tokens held per planned layer and row (batch entry * kv heads + kv head)."""
        return [list(layer.rows.lengths) if layer.rows else [] for layer in self.planned_layers]

    @property
    def tokens(self) -> list[int]:
        """Tokens seen per batch entry, kept or not, without padding."""
        return list(self.planned_layers[0].tokens)

    @property
    def nbytes(self) -> int:
        """Bytes really held by the planned layers: unique storages."""
        return sum(layer.rows.nbytes for layer in self.planned_layers if layer.rows is not None)

    @property
    def element_size(self) -> int:
        """Bytes of one stored number; 0 before the first call."""
        rows = self.planned_layers[0].rows
        return 0 if rows is None else rows.element_size

    @property
    def planned_bytes(self) -> int:
        """Bytes the plan promises at this length, equal to `nbytes`; 0 until the prompt is read."""
        first = self.planned_layers[0]
        if first.rows is None or not first.prompt:
            return 0
        size, every = self.element_size, self.plan.trigger.decode_every
        total = 0
        for b, (prompt, seen, most) in enumerate(
            zip(first.prompt, first.tokens, first.rows.appended, strict=True)
        ):
            # where nothing is evicted while decoding, room once taken stays after a crop
            generated = most if every is None else seen - prompt
            total += cache_bytes(self.plan, prompt, size, generated, self._flushed(b))
        return total

    def _flushed(self, b: int) -> dict[Site, int]:
        """Generated tokens of a batch entry that have been packed so far."""
        found = {
            layer.index: layer.rows.flushed(b)
            for layer in self.planned_layers
            if isinstance(layer.rows, MixedRows)
        }
        sites = [entry.site for entry in self.plan.entries if entry.site.layer in found]
        return {
            site: found[site.layer][site.head or 0]
            for site in sites
            if (site.head or 0) in found[site.layer]
        }

    @property
    def path(self) -> str:
        """Which attention ran last, in words, with the number of layers."""
        names = [layer.path for layer in self.planned_layers]
        return ", ".join(f"{name} in {names.count(name)} layers" for name in dict.fromkeys(names))

    @property
    def probing(self) -> bool:
        """Whether the tokens under way are a probe's."""
        return self._course.probe is not None

    def read_probes(self, decoder: Any, prompt: Mapping[str, Any]) -> None:
        """Read the tokens that score the prompt, if the plan has any, then evict.

        `prompt` are the keyword arguments of the call of `decoder` that has just filled the cache.
        Until then all tokens stay, so that memory holds the full cache of the prompt.
        """
        if all(layer.waiting is None for layer in self.planned_layers):
            return
        try:
            for scorer in self._course.probes:
                self._course.probe = scorer
                read_probe(decoder, self, scorer, prompt)
        finally:
            self._course.probe = None
        if isinstance(self.plan.trigger.online, BestScores):
            best_of_all(self.plan, self.planned_layers)
        else:
            for layer in self.planned_layers:
                layer.evict_probed()

    def show(self, ids: Tensor, valid: Tensor | None) -> None:
        """Note which tokens of the prompt `[B, S]` are images; `valid` (bool) are no padding."""
        token = self.plan.model.image_token
        if token is None:
            return
        images = ids.eq(token)
        if valid is None:
            self._course.images = list(images)
        else:
            self._course.images = [own[kept] for own, kept in zip(images, valid, strict=True)]

    def expect(self, tokens: list[int]) -> None:
        """Announce a prompt that comes in pieces: tokens of each batch entry, without padding.

        After every piece the layers are cut back to what the plan keeps of the whole prompt.
        Raises UnsupportedError for choices that need the whole prompt at once.
        """
        if self.plan.trigger.online is not None:
            raise UnsupportedError(
                "The plan divides tokens among layers for each prompt, which needs the whole of it "
                "at once: apply it without prefill_chunk."
            )
        for _, action in (group for layer in self.planned_layers for group in layer.groups):
            name, mean = action.scorer.name, getattr(action.scorer, "mean", False)
            if name == ProbeAttention.name:
                raise UnsupportedError(
                    "The plan scores its prompt by probes, which need the whole prompt at once: "
                    "apply it without prefill_chunk."
                )
            if action.protect_text:
                raise UnsupportedError(
                    "The plan keeps text before images, which needs the whole prompt at once: "
                    "apply it without prefill_chunk."
                )
            if mean or action.split == "adaptive":
                raise UnsupportedError(
                    f'The plan chooses tokens by "{name}" with '
                    + ("mean" if mean else f'split "{action.split}"')
                    + ", which needs the whole prompt at once: apply it without prefill_chunk."
                )
        self._course.expected = list(tokens)
