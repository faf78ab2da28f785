"""The text of one answer as it grows: detokenized, with stop strings found and held back."""

from __future__ import annotations

from collections.abc import Sequence

from conductor.detokenize import Detokenizer


class AnswerText:
    """Text that may be shown, and whether a stop string has ended the answer.

    The end of the text that could still become a stop string is held back; the stop string itself
    is never shown. Stop strings are looked for from output token `min_tokens` on.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._held = ""
        self._tokens = 0
        self.length = 0  # characters, held-back ones included
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; return the text that it makes showable."""
        self._tokens += 1
        return self._add(self._detokenizer.push(token_id))

    def flush(self) -> str:
        """The answer has ended: return everything that is left."""
        text = self._add(self._detokenizer.flush())
        text += self._held
        self._held = ""
        return text

    def _add(self, new: str) -> str:
        if self.stopped:
            return ""
        self.length += len(new)
        if not self._stop:
            return new
        text = self._held + new
        if self._tokens < self._min_tokens:
            return text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
