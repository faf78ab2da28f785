"""A recorded trace, scaled down to what a few cores can serve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from baton.bench import trace
from baton.bench.trace import TraceRequest

# The recorded lengths are of large GPUs; scaled, the mean is about 750 in and 43 out.
INPUT_SCALE, OUTPUT_SCALE = 1 / 16, 1 / 8
INPUT_LIMIT, OUTPUT_LIMIT = 8192, 256


def read_trace(path: Path) -> tuple[TraceRequest, ...]:
    """All requests, scaled down, in order of arrival. Raises ConfigError."""
    return tuple(
        replace(
            request,
            input_tokens=_scaled(request.input_tokens, INPUT_SCALE, INPUT_LIMIT),
            output_tokens=_scaled(request.output_tokens, OUTPUT_SCALE, OUTPUT_LIMIT),
        )
        for request in trace.read_trace(path)
    )


def _scaled(length: int, scale: float, limit: int) -> int:
    return min(limit, max(1, round(length * scale)))
