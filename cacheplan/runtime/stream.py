"""Text as it is generated: tokens in, words out, with the time of the first one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers.generation.streamers import BaseStreamer


class TextStream(BaseStreamer):  # type: ignore[misc]
    """Receives token ids from `generate` and passes on text that later tokens cannot change."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.text = ""
        self.first_at: float | None = None
        self._prompt_passed = False

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def put(self, value: Any) -> None:
        if not self._prompt_passed:  # `generate` sends the prompt first
            self._prompt_passed = True
            return
        if self.first_at is None:
            self.first_at = time.perf_counter()
        self.ids += value.flatten().tolist()
        self._emit(final=False)

    def end(self) -> None:
        self._emit(final=True)

    def _emit(self, *, final: bool) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        # a trailing replacement character is a multi-byte letter still under way
        if final or not text.endswith("�"):
            self.on_text(text[len(self.text) :])
            self.text = text
