"""Logs of a process: one line per record on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

from baton.types.trace import TraceContext

LEVELS = ("debug", "info", "warning", "error")

_trace: ContextVar[TraceContext | None] = ContextVar("trace", default=None)


@contextmanager
def traced(context: TraceContext | None) -> Iterator[None]:
    """What is logged meanwhile, and by tasks that are made meanwhile, says the trace's id."""
    before = _trace.set(context)
    try:
        yield
    finally:
        _trace.reset(before)


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO decode-0 baton.worker: message`, tracebacks included; behind
    it the trace that it is about, if there is one: `trace=0af7651916cd43dd8448eb211c80319c`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        stamp = f"{seconds}.{int(record.msecs):03d}Z"
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        line = text.replace("\r", "").replace("\n", " | ")
        if (context := _trace.get()) is not None:
            line = f"{line} trace={context.trace_id}"
        return f"{stamp} {record.levelname} {self._process} {record.name}: {line}"


def setup_logging(level: str, process: str, stream: TextIO | None = None) -> None:
    """Send every record of `level` (one of LEVELS) and above to stderr. Replaces older handlers."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(process))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
