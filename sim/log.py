"""What happened in a run, in order: kept as values, written as text only when somebody reads it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from hashlib import blake2b
from typing import Any

MAX_LINES = 2_000  # that are printed: the last ones
MAX_TEXT = 220


class EventLog:
    """`now` is the time of the network."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._events: list[tuple[float, str, str, object]] = []
        self.violations: list[str] = []
        self.excused: set[str] = set()  # loggers that may say that something is broken: it is

    def note(self, who: str, what: str, about: object = "") -> None:
        self._events.append((self._now(), who, what, about))

    def violation(self, text: str) -> None:
        """Something that must never happen, did."""
        self.note("CHECK", "violated", text)
        self.violations.append(f"{self._now():.6f} {text}")

    def digest(self) -> str:
        """The same for two runs in which the same things happened at the same times."""
        state = blake2b(digest_size=8)
        for event in self._events:
            state.update(_line(event).encode())
        return state.hexdigest()

    def lines(self) -> list[str]:
        """The end of the story."""
        kept = self._events[-MAX_LINES:]
        left_out = len(self._events) - len(kept)
        head = [f"... {left_out} events before"] if left_out else []
        return [*head, *(_line(event) for event in kept)]


class ErrorsAreViolations(logging.Handler):
    """Production code logs an error only where something went wrong that it did not foresee."""

    def __init__(self, log: EventLog) -> None:
        super().__init__(logging.ERROR)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        if record.name in self._log.excused:
            return
        cause = record.exc_info[1] if record.exc_info else None
        self._log.violation(f"{record.name} logged: {record.getMessage()} {cause or ''}")


def _line(event: tuple[float, str, str, object]) -> str:
    at, who, what, about = event
    return f"{at:11.6f} {who:12} {what} {_brief(about)}"[:MAX_TEXT]


def _brief(value: Any) -> str:
    """A message in one line; bytes by their length, because some are drawn anew in every run."""
    if isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value)}B"
    if isinstance(value, tuple):
        shown = ", ".join(_brief(part) for part in value[:8])
        return f"({shown}{', ...' if len(value) > 8 else ''})"
    if is_dataclass(value) and not isinstance(value, type):
        if type(value).__name__ == "AttemptId":
            return str(value)
        parts = (_brief(getattr(value, field.name)) for field in fields(value))
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
