"""One layer of a planned cache: stores everything during a step, evicts after its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cacheplan.adapters.attention import AttendingLayer, Step, causal_attention
from cacheplan.adapters.rotary import rotary_frequencies
from cacheplan.errors import UnsupportedError
from cacheplan.plans.rows import kept_rows
from cacheplan.plans.storage import in_few_bits
from cacheplan.runtime.attending import attend
from cacheplan.runtime.cascade import Cascade
from cacheplan.runtime.eviction import (
    Choice,
    Groups,
    Newest,
    accumulate,
    accumulates,
    choose,
    counts_merged,
    cut,
    heads_by_action,
    probes_of,
)
from cacheplan.runtime.mixed import MixedRows
from cacheplan.runtime.rows import RaggedRows
from cacheplan.scorers.preference import preference
from cacheplan.scorers.probe import joined, paid
from cacheplan.scorers.scores import Rotary, Seen
from cacheplan.scorers.selection import kept_tokens
from cacheplan.types import KVPlan, Preference, ProbeAttention, needs_rotary

_REMEMBERED = 64  # prompt lengths whose row counts are kept


class Course:
    """What the layers of one cache have in common; they do not hold the cache itself.

    `expected` are the prompt's tokens per batch entry while it comes in pieces, else None: then
    the first forward call is the whole prompt.  `probes` are the scorers that need tokens read
    behind the prompt, and `probe` is the one for which this is happening.  `images` tell for each
    batch entry which tokens of its prompt `[n]` (bool) stand for images.
    """

    def __init__(self, plan: KVPlan) -> None:
        self.plan = plan
        self.expected: list[int] | None = None
        self.probes = probes_of(plan)
        self.probe: ProbeAttention | None = None
        self.cascade = Cascade(plan) if isinstance(plan.trigger.online, Preference) else None
        self.images: list[Tensor] | None = None
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
        self.rows: RaggedRows | MixedRows | None = None
        self.seen, self.unread = 0, 0
        self.tokens: list[int] = []
        self.prompt: list[int] = []
        self._since = 0  # tokens since the last eviction, where the plan evicts while decoding
        self._whole = True  # nothing has been evicted
        self._fresh: tuple[Tensor, Tensor] | None = None
        self._high: dict[int, Tensor] = {}  # what stays of rows whose other tokens are demoted
        self._step: Step | None = None  # of the layer's own attention
        self.waiting: dict[int, Choice] | None = None  # what is chosen before the probes have run
        self._probed: list[dict[ProbeAttention, Tensor]] = []  # per batch entry, `[1, K, n]` each
        self._scored: dict[int, Choice] = {}  # what rows hold that are to be cut back further
        if self.course.cascade is not None:
            self.course.cascade.clear()  # a call that failed may have left some

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
        if self.course.probe is not None:
            return self._attend_probe(step, self.course.probe)
        if self.waiting is not None:
            raise UnsupportedError(
                "The plan scores its prompt by probes, which only `apply` reads: run the model "
                "inside apply(model, plan)."
            )
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
            if isinstance(self.rows, RaggedRows):
                self._after_attention(self.rows, own)
        return output.contiguous()

    def _count(self, step: Step) -> None:
        B, T = step.query.shape[0], step.query.shape[2]
        new = [T] * B if step.valid is None else [len(valid) for valid in step.valid]
        self.tokens = [n + t for n, t in zip(self.tokens or [0] * B, new, strict=True)]

    def _attention(self, rows: RaggedRows | MixedRows, step: Step) -> Tensor:
        whole = self._whole and step.valid is None
        if whole and isinstance(rows, RaggedRows) and rows.rectangular:
            plain = step.sinks is None and step.softcap is None
            self.path = "dense SDPA" if plain else "dense plain torch"
            return causal_attention(step, *rows.dense())
        output, self.path = attend(rows, step)
        return output

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
                self._cut(rows, self._chosen(rows, step, self._counts(self.tokens), self.groups))
                self._since = 0

    def _within_prompt(self, rows: RaggedRows, step: Step) -> None:
        expected = self.course.expected or self.tokens
        last = self.tokens == expected
        decoding = self.course.plan.trigger.decode_every is not None
        if accumulates(self.groups) and (decoding or self.course.expected is not None):
            if rows.state is None:
                rows.state = torch.zeros(rows.keys.shape[0], device=rows.keys.device)
            self._accumulate(rows, step)
        if self.course.probes:
            groups = [group for group in self.groups if group[1].scorer not in self.course.probes]
            self.waiting = self._chosen(rows, step, self._counts(expected), groups)
            self._probed = [{} for _ in range(rows.batch)]
        elif self.course.cascade is not None:
            none = [[0] * rows.heads] * rows.batch
            self._scored = self._chosen(rows, step, none, self.groups)
            preferences = [self._preference(rows, step, b) for b in range(rows.batch)]
            self.course.cascade.arrived(self, preferences, self.tokens)
        else:
            self._cut(rows, self._chosen(rows, step, self._counts(expected), self.groups))
        if last:
            self.prompt = list(self.tokens)
            if not decoding:
                rows.state = None
            if not self.course.probes:
                self._pack(rows)

    def _attend_probe(self, step: Step, scorer: ProbeAttention) -> Tensor:
        """Attention of probe tokens, which are scored by what they see and not stored."""
        assert isinstance(self.rows, RaggedRows)
        assert self._fresh is not None
        longer = self.rows.extended(*self._fresh, step.valid)
        if self.unread == self.readers - 1:  # tokens are ranked by the layer's own queries
            for b, probed in enumerate(self._probed):
                key, _ = longer.together(list(longer.of_entry(b)))
                found = paid(scorer, self._queries(step, b), key[None], scale=step.scale)
                probed[scorer] = joined(scorer, probed.get(scorer), found)
        if self.unread == 0:
            self._fresh = None
        return self._attention(longer, step).contiguous()

    def evict_probed(self) -> None:
        """Evict the prompt once all probes have been read."""
        assert isinstance(self.rows, RaggedRows)
        assert self.waiting is not None
        groups = [group for group in self.groups if group[1].scorer in self.course.probes]
        probed = self._chosen(self.rows, None, self._counts(self.prompt), groups)
        self._cut(self.rows, self.waiting | probed)
        self.waiting, self._probed = None, []
        self._pack(self.rows)

    def score_probed(self) -> dict[int, Choice]:
        """Score all tokens of every row once all probes have been read; `cut_back` follows."""
        assert isinstance(self.rows, RaggedRows)
        none = [[0] * self.rows.heads] * self.rows.batch
        self._scored = self._chosen(self.rows, None, none, self.groups)
        self.waiting, self._probed = None, []
        return self._scored

    def cut_back(self, parts: Sequence[int], *, last: bool) -> None:
        """Leave row r `parts[r]` tokens, by the scores they had in the prompt."""
        assert isinstance(self.rows, RaggedRows)
        choices = {}
        for r, held in self._scored.items():
            if parts[r] < self.rows.lengths[r]:
                (kept,) = kept_tokens(held.scores[None, None], [parts[r]], held.action)
                choices[r] = replace(held, kept=kept)
                self._scored[r] = replace(held, scores=held.scores[kept])
        self._cut(self.rows, choices)
        if last:
            self._scored = {}

    def _preference(self, rows: RaggedRows, step: Step, b: int) -> float:
        """What entry b's attention in this layer prefers to have of the cache."""
        weight = self.course.plan.trigger.online
        assert isinstance(weight, Preference)
        key, value = rows.together(list(rows.of_entry(b)))
        seen = Seen(self._queries(step, b), key[None], value[None], step.scale)
        return preference(weight, seen)

    def _counts(self, lengths: list[int]) -> list[list[int]]:
        """What the plan keeps of texts of these lengths, per entry and kv head."""
        return [self.course.rows(length)[self.index] for length in lengths]

    def _chosen(
        self, rows: RaggedRows, step: Step | None, counts: list[list[int]], groups: Groups
    ) -> dict[int, Choice]:
        """What stays of the rows of every entry that holds more tokens than it may."""
        choices: dict[int, Choice] = {}
        for b in range(rows.batch):
            held = [rows.lengths[r] for r in rows.of_entry(b)]
            if any(n > count for n, count in zip(held, counts[b], strict=True)):
                images = self._images(b, held, groups)
                if step is None:
                    none = rows.keys.new_zeros(1, rows.heads, 0, 1)
                    newest = Newest(none, probed=self._probed[b], images=images)
                else:
                    query = self._queries(step, b)
                    start = self.tokens[b] - query.shape[2]
                    rotary = self._rotary(step, (self.course.expected or self.tokens)[b])
                    newest = Newest(query, step.scale, start, rotary, images=images)
                choices |= choose(rows, b, newest, counts[b], groups)
        return choices

    def _cut(self, rows: RaggedRows, choices: dict[int, Choice]) -> None:
        """Leave what was chosen; losers that are demoted stay until the layer is packed."""
        self._high = {r: c.kept for r, c in choices.items() if c.action.low is not None}
        choices = {r: choice for r, choice in choices.items() if r not in self._high}
        if rows.bias is None and counts_merged(self.groups):
            rows.bias = torch.zeros(rows.keys.shape[0], device=rows.keys.device)
        if any(len(choice.kept) < rows.lengths[r] for r, choice in choices.items()):
            self._whole = False
        cut(rows, choices)

    def _pack(self, rows: RaggedRows) -> None:
        """Store the heads that have few bits in them, once the whole prompt has been read."""
        if any(in_few_bits(action) for _, action in self.groups):
            self.rows, self._whole = MixedRows(rows, self.groups, self._high), False
        self._high = {}

    def _images(self, b: int, held: list[int], groups: Groups) -> Tensor | None:
        """Image tokens of entry b's prompt `[1, n]`, where text goes before them."""
        if not any(action.protect_text for _, action in groups):
            return None
        told = self.course.images
        if told is None or set(held) != {len(told[b])}:
            raise UnsupportedError(
                "The plan keeps text before images, but which tokens are images is not known: run "
                "the model inside apply(model, plan), with input_ids and a mask of padding alone."
            )
        return told[b][None]

    def _rotary(self, step: Step, length: int) -> Rotary | None:
        """How the layer rotates, where one of its scorers must know."""
        if any(needs_rotary(action.scorer) for _, action in self.groups):
            return Rotary(*rotary_frequencies(step.module, length, step.query.device))
        return None

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
