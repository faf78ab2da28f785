"""Request lengths and arrivals of a recorded trace in Mooncake's JSONL format (FAST'25 artifact):
`timestamp` in milliseconds, `input_length` and `output_length` in tokens."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class TraceError(Exception):
    """The file is not a trace of this format."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    at_s: float
    input_tokens: int
    output_tokens: int


# The recorded lengths are of large GPUs; scaled, the mean is about 750 in and 43 out.
INPUT_SCALE, OUTPUT_SCALE = 1 / 16, 1 / 8
INPUT_LIMIT, OUTPUT_LIMIT = 8192, 256


def read_trace(path: Path) -> tuple[TraceRequest, ...]:
    """All requests, scaled down, in order of arrival. Raises TraceError."""
    rows = []
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                rows.append((row["timestamp"], row["input_length"], row["output_length"]))
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{path}, line {len(rows) + 1}: not a request ({error!r})") from error
    if not rows:
        raise TraceError(f"{path} is empty")
    rows.sort(key=lambda row: row[0])  # stable: requests of one step keep their order
    times = spread([row[0] / 1e3 for row in rows])
    return tuple(
        TraceRequest(
            at_s, _scaled(given, INPUT_SCALE, INPUT_LIMIT), _scaled(out, OUTPUT_SCALE, OUTPUT_LIMIT)
        )
        for at_s, (_, given, out) in zip(times, rows, strict=True)
    )


def _scaled(length: int, scale: float, limit: int) -> int:
    return min(limit, max(1, round(length * scale)))


def spread(times: Sequence[float]) -> list[float]:
    """Recorded times are in steps of seconds, with dozens of requests at once. Each group is spread
    evenly, with a random place in each slot, up to the next group; order is kept.

    `times` in seconds, ascending.
    """
    generator = random.Random(0)
    starts = sorted(set(times))
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    gaps.append(sum(gaps) / len(gaps) if gaps else 1.0)
    sizes = dict.fromkeys(starts, 0)
    for time in times:
        sizes[time] += 1
    return [
        start + gap * (slot + generator.random()) / sizes[start]
        for start, gap in zip(starts, gaps, strict=True)
        for slot in range(sizes[start])
    ]
