"""Recorded traces in Mooncake's JSONL format (FAST'25 artifact): one request per line with
`timestamp` in milliseconds, `input_length` and `output_length` in tokens, and `hash_ids`, the
chained ids of its prompt's blocks of 512 tokens: equal ids are equal blocks after equal prefixes.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.errors import ConfigError

BLOCK_TOKENS = 512  # that one of the trace's ids stands for


@dataclass(frozen=True, slots=True)
class TraceRequest:
    at_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()


def read_trace(path: Path) -> tuple[TraceRequest, ...]:
    """All requests in order of arrival, lengths as recorded. Raises ConfigError."""
    rows: list[tuple[float, int, int, tuple[int, ...]]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                ids = tuple(int(number) for number in row.get("hash_ids", ()))
                given, out = int(row["input_length"]), int(row["output_length"])
                rows.append((float(row["timestamp"]), given, out, ids))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}, line {len(rows) + 1}: not a request ({error!r})") from error
    if not rows:
        raise ConfigError(f"{path} is empty")
    rows.sort(key=lambda row: row[0])  # stable: requests of one step keep their order
    times = spread([row[0] / 1e3 for row in rows])
    return tuple(
        TraceRequest(at_s, given, out, ids)
        for at_s, (_, given, out, ids) in zip(times, rows, strict=True)
    )


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
