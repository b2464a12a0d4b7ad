"""Which handlers a denoiser has under a plan, and how they are set for one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from cacheplan.adapters.anatomy import is_unet, left_out
from cacheplan.adapters.calls import unwrapped
from cacheplan.adapters.taps import compiled
from cacheplan.errors import UnsupportedError
from cacheplan.plans.compute import text_parts
from cacheplan.plans.words import site_words
from cacheplan.runtime.features.blocks import (
    ADD,
    BRANCH,
    HOLLOW,
    PASS,
    PUT,
    RUN,
    BlockHandler,
    Observer,
    Span,
)
from cacheplan.runtime.features.parts import PartHandler
from cacheplan.runtime.features.program import Program
from cacheplan.runtime.features.store import Feature
from cacheplan.runtime.features.texts import TextHandler, Texts
from cacheplan.runtime.features.values import Forecast, Ready
from cacheplan.types import FeatureSite

ValueOf = Callable[[FeatureSite], Forecast]
Handler = BlockHandler | PartHandler | TextHandler


class Wiring:
    """The handlers of one denoiser, whose blocks are `blocks` of the plan's model."""

    def __init__(self, program: Program, denoiser: nn.Module, prefix: str, blocks: range) -> None:
        self.program, self.prefix, self.blocks = program, prefix, blocks
        self.root = unwrapped(denoiser)
        self.whole = compiled(denoiser) or compiled(self.root)
        self.observed = False  # streams of all blocks are known
        self.spans: dict[FeatureSite, Span] = {}
        self.of_block: dict[int, BlockHandler] = {}
        self.of_part: dict[FeatureSite, PartHandler] = {}
        self._traced: dict[int, bool] = {}  # by the handler's id
        for site in program.sites:
            self._add(site)
        self.texts = Texts(self._projections() if program.text_once else ())

    @property
    def sites(self) -> tuple[FeatureSite, ...]:
        """The features of the denoiser's blocks and parts."""
        return (*self.spans, *self.of_part)

    def _add(self, site: FeatureSite) -> None:
        if site.part == "model":
            return
        if site.part not in ("hidden", "delta", "branch"):
            if site.first in self.blocks:
                self.of_part[site] = PartHandler()
            return
        inside = self.blocks if site.part == "hidden" else range(site.first, site.last)
        if inside.start not in self.blocks:
            return
        if site.part == "branch":
            paths = [self.path(index) for index in inside]
            if paths != (expected := left_out(self.root)):
                raise UnsupportedError(
                    f"The plan leaves out blocks {', '.join(paths)} for the branch, but those "
                    f"below the last up block are {', '.join(expected)}: plan these."
                )
        self.spans[site] = Span(site.part)
        for index in inside:
            block = self.need(index)
            if site.part == "delta" and index > inside.start:
                block.within = block.within or site_words(site)

    def need(self, index: int) -> BlockHandler:
        """The handler of a block."""
        handler = BlockHandler(self.path(index), unet=is_unet(self.root))
        return self.of_block.setdefault(index, handler)

    def need_attention(self) -> PartHandler:
        """The handler of the first block's attention."""
        first = self.blocks[0]
        site = FeatureSite(part="attention", first=first, last=first + 1)
        return self.of_part.setdefault(site, PartHandler())

    def path(self, index: int) -> str:
        """The block's path within its denoiser."""
        return self.program.spec.blocks[index].path.removeprefix(self.prefix)

    def _projections(self) -> tuple[str, ...]:
        """Paths of what makes keys and values of the text."""
        return tuple(
            f"{block.path.removeprefix(self.prefix)}.{part.path}.{name}"
            for block, part, text in text_parts(self.program.spec.blocks[i] for i in self.blocks)
            for name in text.paths
        )

    def handlers(self) -> dict[str, Handler]:
        """The taps to install, by path."""
        found: dict[str, Handler] = {self.path(i): h for i, h in self.of_block.items()}
        for site, handler in self.of_part.items():
            part = next(
                p for p in self.program.spec.blocks[site.first].parts if p.name == site.part
            )
            found[f"{self.path(site.first)}.{part.path}"] = handler
        return found | self.texts.handlers

    def traced(self, handler: Handler) -> bool:
        """Whether compiled code runs through the handler."""
        if self.whole:
            return True
        if not self._traced:
            for path, other in self.handlers().items():
                above = [path.rsplit(".", n)[0] for n in range(1, path.count(".") + 1)]
                inside = any(compiled(self.root.get_submodule(parent)) for parent in above)
                self._traced[id(other)] = inside
        return self._traced[id(handler)]

    def idle(self) -> None:
        """Only run every module."""
        handlers: list[Handler] = [*self.of_block.values(), *self.of_part.values()]
        for handler in handlers:
            handler.idle()
        self.texts.idle()

    def set(self, step: int, value_of: ValueOf, *, promoted: bool) -> None:
        """Make every handler ready for a call at `step`."""
        self.idle()
        stored = self.program.stores(step, promoted=promoted)
        for site in stored:
            if site in self.of_part:
                self.of_part[site].keeps = True
            elif site in self.spans:
                span, own = self.spans[site], self.program.span(site, step)
                self.of_block[own[0]].opens += (span,)
                self.of_block[own[-1]].closes += (span,)
        if promoted:
            return
        for site, action in self.program.actions[step].items():
            if site in self.of_part:
                part = self.of_part[site]
                part.value = self._value(part, value_of(site))
            elif site in self.spans:
                blocks = [self.of_block[index] for index in self.program.span(site, step)]
                first, last = _modes(site.part)
                for block in blocks:
                    block.mode = HOLLOW if site.part == "branch" else PASS
                if action.do == "skip":
                    continue
                end, mode = (blocks[0], first) if first != RUN else (blocks[-1], last)
                end.mode, end.value = mode, self._value(end, value_of(site))

    def _value(self, handler: Handler, value: Forecast) -> Forecast | Ready:
        return Ready(value.alone()) if self.traced(handler) else value

    def collect(self) -> Iterator[tuple[FeatureSite, Feature]]:
        """The features that were computed in this call, taken out of the handlers."""
        holders: dict[FeatureSite, Span | PartHandler] = {**self.spans, **self.of_part}
        for site, holder in holders.items():
            if holder.fresh is not None:
                yield site, holder.fresh
                holder.fresh = None

    def forget(self) -> None:
        """Let go of what a call that was broken off has left."""
        for span in self.spans.values():
            span.inputs, span.fresh = (), None
        for part in self.of_part.values():
            part.fresh = None
        self.texts.forget()

    def observe(self) -> None:
        """Have the next call observed, block by block."""
        observer = Observer()
        for handler in self.of_block.values():
            handler.observer = observer


def _modes(part: str) -> tuple[str, str]:
    """What the first and the last block of a range do when it is left out."""
    return {"delta": (ADD, PASS), "hidden": (RUN, PUT), "branch": (RUN, BRANCH)}[part]
