"""Logs and metrics of a process. Logs: one line per record on stderr. Metrics: `baton_*`."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LEVELS = ("debug", "info", "warning", "error")


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO decode-0 baton.worker: message`, tracebacks included."""

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


class Metrics:
    """The metrics of one process, in a registry of its own. Names start with `baton_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def counter(self, name: str, help: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(_checked(name), help, labels, registry=self.registry)

    def gauge(self, name: str, help: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(_checked(name), help, labels, registry=self.registry)

    def histogram(
        self, name: str, help: str, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        return Histogram(_checked(name), help, labels, buckets=buckets, registry=self.registry)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)


def _checked(name: str) -> str:
    if not name.startswith("baton_"):
        raise ValueError(f"metric {name} must be called baton_{name}")
    return name
