"""The cache that follows a plan: stores everything during a step, evicts after its attention."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cacheplan.adapters.attention import AttendingCache, AttendingLayer, causal_attention
from cacheplan.errors import UnsupportedError
from cacheplan.kernels.column_sums.naive import column_sums
from cacheplan.kernels.ragged_attention.naive import ragged_attention
from cacheplan.plans.check import check_model, check_runnable
from cacheplan.plans.rows import cache_bytes, kept_rows
from cacheplan.runtime.rows import RaggedRows
from cacheplan.scorers.scores import score
from cacheplan.scorers.selection import kept_tokens
from cacheplan.types import AccumulatedAttention, KVAction, KVPlan, LanguageSpec


class PlanCache(AttendingCache):
    """A transformers `Cache` that follows a plan, for one sequence batch.

    Pass it as `past_key_values`, inside `apply(model, plan)`.  The first forward call on an
    empty cache is the prompt; its attention sees every token, then the plan evicts, so the
    first generated token is that of the full cache.
    """

    def __init__(self, plan: KVPlan, spec: LanguageSpec | None = None) -> None:
        """Check the plan (and, given `spec`, that it belongs to that model)."""
        check_runnable(plan)
        if spec is not None:
            check_model(plan, spec)
        self.plan = plan
        self._course = Course(plan)
        super().__init__([PlanLayer(self._course, index) for index in range(plan.model.layers)])

    @property
    def lengths(self) -> list[list[int]]:
        """Tokens held per layer and row (batch entry * kv heads + kv head)."""
        return [[] if layer.rows is None else list(layer.rows.lengths) for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes really held: unique storages of all layers."""
        return sum(layer.rows.nbytes for layer in self.layers if layer.rows is not None)

    @property
    def planned_bytes(self) -> int:
        """Bytes the plan promises at this length; equal to `nbytes`."""
        first = self.layers[0]
        if first.rows is None:
            return 0
        size = first.rows.keys.element_size()
        length = self._course.prompt_length
        batch: int = first.rows.batch
        return batch * cache_bytes(self.plan, length, size, first.seen - length)

    @property
    def path(self) -> str:
        """Which attention ran last, in words, with the number of layers."""
        names = [layer.path for layer in self.layers]
        return ", ".join(f"{name} in {names.count(name)} layers" for name in dict.fromkeys(names))


class Course:
    """What the layers of one cache have in common; they do not hold the cache itself."""

    def __init__(self, plan: KVPlan) -> None:
        self.plan = plan
        self.prompt_length = 0
        self._rows_at: tuple[int, list[list[int]]] = (-1, [])  # all layers ask for one length

    def rows(self, length: int) -> list[list[int]]:
        """Tokens to keep per layer and kv head once `length` tokens have been seen."""
        if self._rows_at[0] != length:
            self._rows_at = length, kept_rows(self.plan, length).tolist()
        return self._rows_at[1]


class PlanLayer(AttendingLayer):
    """One layer of a planned cache."""

    def __init__(self, course: Course, index: int) -> None:
        super().__init__()
        self.course, self.index = course, index
        self.rows: RaggedRows | None = None
        self.path = "idle"
        self._new = 0  # tokens of the step under way
        self._since = 0  # tokens since the last eviction
        self._groups = _heads_by_action(course.plan, index)

    def reset(self) -> None:
        self.rows, self.seen, self._since = None, 0, 0

    def receive(self, key: Tensor, value: Tensor) -> None:
        self._new = key.shape[2]
        if self.rows is not None:
            self.rows.append(key, value)
            return
        expected = self.course.plan.model
        if (key.shape[1], key.shape[3], value.shape[3]) != (
            expected.kv_heads,
            expected.key_width,
            expected.value_width,
        ):
            raise UnsupportedError(
                f"Layer {self.index} stores {key.shape[1]} heads of widths {key.shape[3]} and "
                f"{value.shape[3]}, but the plan expects {expected.kv_heads} of "
                f"{expected.key_width} and {expected.value_width}: solve a plan for this model."
            )
        self.rows = RaggedRows(key, value)
        self.course.prompt_length = self._new

    def attend(self, module: torch.nn.Module, query: Tensor, scale: float) -> Tensor:
        rows = self.rows
        assert rows is not None
        if rows.rectangular:
            self.path = "dense SDPA"
            output = causal_attention(module, query, *rows.dense(), scale)
        else:
            self.path = "ragged SDPA per head"
            output = ragged_attention(
                query,
                rows.keys,
                rows.values,
                offsets=rows.offsets,
                lengths=rows.lengths,
                scale=scale,
            ).transpose(1, 2)
        self._after_attention(rows, query, scale)
        return output.contiguous()

    def _after_attention(self, rows: RaggedRows, query: Tensor, scale: float) -> None:
        every = self.course.plan.trigger.decode_every
        if self.seen == self._new:
            self._evict_after_prompt(rows, query, scale)
        elif every is not None:
            if self._since + self._new > every:
                raise UnsupportedError(
                    f"The plan evicts every {every} tokens, but {self._new} came in one call when "
                    f"{every - self._since} were left until then: feed no more than those."
                )
            if rows.state is not None:
                self._accumulate(rows, rows.state, query, scale)
            self._since += self._new
            if self._since == every:
                self._evict_while_decoding(rows, query, scale)
                self._since = 0

    def _evict_after_prompt(self, rows: RaggedRows, query: Tensor, scale: float) -> None:
        key, _ = rows.dense()
        counts = self.course.rows(self.seen)[self.index]
        kept: dict[int, Tensor] = {}
        if self._accumulates:
            rows.state = column_sums(query, key, scale=scale).flatten()
        if all(count == self.seen for count in counts):
            return
        group = query.shape[1] // key.shape[1]
        for heads, action in self._groups:
            queries = [h * group + g for h in heads for g in range(group)]
            scores = score(action.scorer, query[:, queries], key[:, heads], scale)
            chosen = kept_tokens(scores, [counts[h] for h in heads], action)
            for b in range(rows.batch):
                for i, h in enumerate(heads):
                    kept[b * rows.heads + h] = chosen[b * len(heads) + i]
        rows.keep([kept[r] for r in range(len(kept))])

    def _evict_while_decoding(self, rows: RaggedRows, query: Tensor, scale: float) -> None:
        counts = self.course.rows(self.seen)[self.index]
        group = query.shape[1] // rows.heads
        kept: dict[int, Tensor] = {}
        for heads, action in self._groups:
            for r in (b * rows.heads + h for b in range(rows.batch) for h in heads):
                key = rows.keys[rows.row(r)][None, None]
                count = min(counts[r % rows.heads], rows.lengths[r])
                if rows.state is not None and isinstance(action.scorer, AccumulatedAttention):
                    scores = rows.state[rows.row(r)][None, None]
                else:
                    b, h = divmod(r, rows.heads)
                    own = query[b : b + 1, h * group : (h + 1) * group]
                    scores = score(action.scorer, own, key, scale)
                kept[r] = kept_tokens(scores, [count], action)[0]
        rows.keep([kept[r] for r in range(len(kept))])

    @property
    def _accumulates(self) -> bool:
        return self.course.plan.trigger.decode_every is not None and any(
            isinstance(action.scorer, AccumulatedAttention) for _, action in self._groups
        )

    def _accumulate(self, rows: RaggedRows, state: Tensor, query: Tensor, scale: float) -> None:
        """Add the step's attention to the scores of the tokens it saw (H2O)."""
        group = query.shape[1] // rows.heads
        for r in range(len(rows.lengths)):
            b, h = divmod(r, rows.heads)
            own = query[b : b + 1, h * group : (h + 1) * group]
            key = rows.keys[rows.row(r)][None, None]
            state[rows.row(r)] += column_sums(own, key, scale=scale)[0, 0]


def _heads_by_action(plan: KVPlan, layer: int) -> list[tuple[list[int], KVAction]]:
    """The kv heads of one layer, grouped by what is done, so that each scorer runs once."""
    groups: dict[KVAction, list[int]] = {}
    for entry in plan.entries:
        action = entry.action
        if entry.site.layer != layer or not isinstance(action, KVAction):
            continue
        whole = entry.site.head is None
        heads = list(range(plan.model.kv_heads)) if whole else [entry.site.head or 0]
        groups.setdefault(replace(action, keep=1.0), []).extend(heads)
    return [(heads, action) for action, heads in groups.items()]
