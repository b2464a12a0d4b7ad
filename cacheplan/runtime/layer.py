"""One layer of a planned cache: stores everything during a step, evicts after its attention."""

from __future__ import annotations

import torch
from torch import Tensor

from cacheplan.adapters.attention import AttendingLayer, Step, causal_attention
from cacheplan.errors import UnsupportedError
from cacheplan.kernels.ragged_attention.naive import ragged_attention
from cacheplan.plans.rows import kept_rows
from cacheplan.runtime.eviction import accumulate, accumulates, choose, heads_by_action
from cacheplan.runtime.rows import RaggedRows
from cacheplan.types import KVPlan

_REMEMBERED = 64  # prompt lengths whose row counts are kept


class Course:
    """What the layers of one cache have in common; they do not hold the cache itself.

    `expected` are the prompt's tokens per batch entry while it comes in pieces, else None: then
    the first forward call is the whole prompt.
    """

    def __init__(self, plan: KVPlan) -> None:
        self.plan = plan
        self.expected: list[int] | None = None
        self._rows: dict[int, list[list[int]]] = {}

    def rows(self, length: int) -> list[list[int]]:
        """Tokens to keep per layer and kv head once `length` tokens have been seen."""
        if length not in self._rows:
            if len(self._rows) >= _REMEMBERED:
                self._rows.clear()
            self._rows[length] = kept_rows(self.plan, length).tolist()
        return self._rows[length]


class PlanLayer(AttendingLayer):
    """One planned layer.

    `tokens` counts per batch entry what has passed, without padding; `prompt` is the part of it
    that belongs to the prompt.
    """

    def __init__(self, course: Course, index: int, readers: int = 1) -> None:
        super().__init__(readers)
        self.course, self.index = course, index
        self.groups = heads_by_action(course.plan, index)
        self.path = "idle"
        self.reset()

    def reset(self) -> None:
        self.rows: RaggedRows | None = None
        self.seen, self.unread = 0, 0
        self.tokens: list[int] = []
        self.prompt: list[int] = []
        self._since = 0  # tokens since the last eviction, where the plan evicts while decoding
        self._whole = True  # nothing has been evicted
        self._fresh: tuple[Tensor, Tensor] | None = None
        self._step: Step | None = None  # of the layer's own attention

    def receive(self, key: Tensor, value: Tensor) -> None:
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
        self._fresh = key, value

    def attend(self, step: Step) -> Tensor:
        first = self.rows is None
        if self._fresh is not None:
            key, value = self._fresh
            if first and step.valid is None:
                self.rows = RaggedRows(key, value)
            elif first:
                # attended to as it came; the rows hold what is not padding
                self.rows = RaggedRows(key, value, step.valid)
            else:
                assert self.rows is not None
                self.rows.append(key, value, step.valid)
            self._count(step)
            self._step, self._fresh = step, None
        assert self.rows is not None
        assert self._step is not None
        output = self._attention(self.rows, step)
        if self.unread == 0:
            own, self._step = self._step, None
            self._after_attention(self.rows, own)
        return output.contiguous()

    def _count(self, step: Step) -> None:
        B, T = step.query.shape[0], step.query.shape[2]
        new = [T] * B if step.valid is None else [len(valid) for valid in step.valid]
        self.tokens = [n + t for n, t in zip(self.tokens or [0] * B, new, strict=True)]

    def _attention(self, rows: RaggedRows, step: Step) -> Tensor:
        if self._whole and rows.rectangular and step.valid is None:
            self.path = "dense SDPA"
            return causal_attention(step, *rows.dense())
        self.path = "SDPA over all rows" if rows.rectangular else "ragged SDPA per head"
        if step.valid is None:
            return self._over(rows, range(rows.batch), step.query, step)
        B, H, T, _ = step.query.shape
        out = step.query.new_zeros(B, T, H, rows.values.shape[-1])
        for b, tokens in enumerate(step.valid):
            if len(tokens):
                out[b, tokens] = self._over(
                    rows, range(b, b + 1), step.query[b : b + 1, :, tokens], step
                )[0]
        return out

    def _over(self, rows: RaggedRows, entries: range, query: Tensor, step: Step) -> Tensor:
        """Attention of some batch entries' queries `[b, H, t, D]`; returns `[b, t, H, Dv]`."""
        pattern = step.pattern
        if pattern is not None and step.valid is not None:
            own = step.valid[entries.start]
            pattern = pattern[entries.start : entries.stop, own][:, :, own]
        some = slice(entries.start * rows.heads, entries.stop * rows.heads)
        return ragged_attention(
            query,
            rows.keys,
            rows.values,
            offsets=rows.offsets[some],
            lengths=rows.lengths[some],
            scale=step.scale,
            pattern=pattern,
            sinks=step.sinks,
        ).transpose(1, 2)

    def _after_attention(self, rows: RaggedRows, step: Step) -> None:
        every = self.course.plan.trigger.decode_every
        if not self.prompt:
            self._within_prompt(rows, step)
        elif every is not None:
            T = step.query.shape[2]
            if step.valid is not None:
                raise UnsupportedError(
                    "The plan evicts while decoding, but a later call is padded: "
                    "continue the texts of a batch by as many tokens each."
                )
            if self._since + T > every:
                raise UnsupportedError(
                    f"The plan evicts every {every} tokens, but {T} came in one call when "
                    f"{every - self._since} were left until then: feed no more than those."
                )
            if rows.state is not None:
                self._accumulate(rows, step)
            self._since += T
            if self._since == every:
                self._evict(rows, step, self.tokens)
                self._since = 0

    def _within_prompt(self, rows: RaggedRows, step: Step) -> None:
        expected = self.course.expected or self.tokens
        last = self.tokens == expected
        decoding = self.course.plan.trigger.decode_every is not None
        if accumulates(self.groups) and (decoding or self.course.expected is not None):
            if rows.state is None:
                rows.state = torch.zeros(rows.keys.shape[0], device=rows.keys.device)
            self._accumulate(rows, step)
        self._evict(rows, step, expected)
        if last:
            self.prompt = list(self.tokens)
            if not decoding:
                rows.state = None

    def _evict(self, rows: RaggedRows, step: Step, lengths: list[int]) -> None:
        """Cut every entry back to what the plan keeps of a text of that length."""
        kept: list[Tensor] = []
        for b in range(rows.batch):
            own = rows.of_entry(b)
            held = [rows.lengths[r] for r in own]
            counts = self.course.rows(lengths[b])[self.index]
            if all(n <= count for n, count in zip(held, counts, strict=True)):
                kept += [torch.arange(n, device=rows.keys.device) for n in held]
            else:
                query = self._queries(step, b)
                kept += choose(rows, b, query, counts, self.groups, scale=step.scale)
        if any(len(k) < n for k, n in zip(kept, rows.lengths, strict=True)):
            self._whole = False
        rows.keep(kept)

    def _accumulate(self, rows: RaggedRows, step: Step) -> None:
        for b in range(rows.batch):
            accumulate(rows, b, self._queries(step, b), step.scale)

    @staticmethod
    def _queries(step: Step, b: int) -> Tensor:
        """The entry's queries without padding, `[1, H, t, D]`."""
        own = step.query[b : b + 1]
        return own if step.valid is None else own[:, :, step.valid[b]]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens (a negative number of them), as assisted decoding does."""
        tokens = -tokens_to_remove
        if tokens == 0 or self.rows is None:
            return
        if self.course.plan.trigger.decode_every is not None:
            raise UnsupportedError(
                "Tokens cannot be taken back from a plan that evicts while decoding: "
                "generate without an assistant, or solve without --decode-every."
            )
        if not self._whole and tokens > min(self._generated):
            raise UnsupportedError(
                f"{tokens} tokens are to be taken back, but only {min(self._generated)} have come "
                "since the eviction: crop no part of the prompt."
            )
        self.rows.drop_newest(tokens)
        self.seen -= tokens
        self.tokens = [n - tokens for n in self.tokens]
        self.prompt = [min(p, n) for p, n in zip(self.prompt, self.tokens, strict=True)]

    @property
    def _generated(self) -> list[int]:
        return [n - p for n, p in zip(self.tokens, self.prompt, strict=True)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(len(self.tokens))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([b for b in range(len(self.tokens)) for _ in range(repeats)])

    def _select(self, entries: list[int]) -> None:
        if self.rows is None or entries == list(range(len(self.tokens))):
            return
        self.rows.select(entries)
        self.tokens = [self.tokens[b] for b in entries]
        self.prompt = [self.prompt[b] for b in entries]
