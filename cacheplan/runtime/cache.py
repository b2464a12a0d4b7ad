"""The cache that follows a plan, for `past_key_values`."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

from cacheplan.adapters.attention import AttendingCache
from cacheplan.adapters.language import readers
from cacheplan.errors import UnsupportedError
from cacheplan.plans.check import check_runnable
from cacheplan.plans.rows import cache_bytes
from cacheplan.runtime.layer import Course, PlanLayer
from cacheplan.types import KVPlan


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
        return 0 if rows is None else rows.keys.element_size()

    @property
    def planned_bytes(self) -> int:
        """Bytes the plan promises at this length, equal to `nbytes`; 0 until the prompt is read."""
        first = self.planned_layers[0]
        if first.rows is None or not first.prompt:
            return 0
        size, every = self.element_size, self.plan.trigger.decode_every
        return sum(
            # where nothing is evicted while decoding, room once taken stays after a crop
            cache_bytes(self.plan, prompt, size, most if every is None else seen - prompt)
            for prompt, seen, most in zip(
                first.prompt, first.tokens, first.rows.appended, strict=True
            )
        )

    @property
    def path(self) -> str:
        """Which attention ran last, in words, with the number of layers."""
        names = [layer.path for layer in self.planned_layers]
        return ", ".join(f"{name} in {names.count(name)} layers" for name in dict.fromkeys(names))

    def expect(self, tokens: list[int]) -> None:
        """Announce a prompt that comes in pieces: tokens of each batch entry, without padding.

        After every piece the layers are cut back to what the plan keeps of the whole prompt.
        Raises UnsupportedError for choices that need the whole prompt at once.
        """
        for _, action in (group for layer in self.planned_layers for group in layer.groups):
            name, mean = action.scorer.name, getattr(action.scorer, "mean", False)
            if mean or action.split == "adaptive":
                raise UnsupportedError(
                    f'The plan chooses tokens by "{name}" with '
                    + ("mean" if mean else f'split "{action.split}"')
                    + ", which needs the whole prompt at once: apply it without prefill_chunk."
                )
        self._course.expected = list(tokens)
