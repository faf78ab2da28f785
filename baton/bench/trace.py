"""Recorded traces in Mooncake's JSONL format (FAST'25 artifact): one request per line with
`timestamp` in milliseconds, `input_length` and `output_length` in tokens, and `hash_ids`, the
chained ids of its prompt's blocks of 512 tokens: equal ids are equal blocks after equal prefixes.
Two keys are ours, and optional: `tenant` and `priority`.
"""

from __future__ import annotations

import gzip
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

import orjson

from baton.errors import ConfigError

BLOCK_TOKENS = 512  # that one of the trace's ids stands for


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`blocks`: ids of the prompt's blocks from its beginning; the last one may stand for less than
    a whole block. What they do not cover of the prompt is shared with no other request."""

    at_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    tenant: str = ""
    priority: int = 0


def read_trace(path: Path) -> tuple[TraceRequest, ...]:
    """All requests in order of arrival, lengths as recorded, quantised arrivals spread. A file that
    ends in .gz is unpacked. Raises ConfigError, which names the line."""
    requests: list[TraceRequest] = []
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 - errors name it
                if not line.isspace():
                    requests.append(_request(orjson.loads(line)))
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {number}: not JSON ({error.msg})") from error
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: not a request ({error})") from error
    if not requests:
        raise ConfigError(f"{path} is empty")
    requests.sort(key=lambda request: request.at_s)  # stable: those of one step keep their order
    times = spread([request.at_s for request in requests])
    return tuple(replace(request, at_s=at_s) for at_s, request in zip(times, requests, strict=True))


def spread(times: Sequence[float]) -> list[float]:
    """Recorded times are in steps of seconds, with dozens of requests at once. Each group is spread
    evenly, with a random place in each slot, up to the next group; order is kept. Times that all
    differ are not in steps and stay.

    `times` in seconds, ascending.
    """
    generator = random.Random(0)
    starts = sorted(set(times))
    if len(starts) == len(times):
        return list(times)
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


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _request(row: object) -> TraceRequest:
    """Raises ValueError, which says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    at_ms = row.get("timestamp")
    if not isinstance(at_ms, int | float) or not math.isfinite(at_ms):
        raise ValueError(f"timestamp is {at_ms!r}, not milliseconds")
    input_tokens = _integer(row, "input_length", least=1)
    blocks = row.get("hash_ids", [])
    if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
        raise ValueError("hash_ids is no list of integers")
    if len(blocks) > -(-input_tokens // BLOCK_TOKENS):
        raise ValueError(f"{len(blocks)} hash_ids for {input_tokens} tokens: more than one per 512")
    return TraceRequest(
        at_ms / 1e3,
        input_tokens,
        _integer(row, "output_length", least=1),
        tuple(blocks),
        str(row.get("tenant", "")),
        _integer(row, "priority") if "priority" in row else 0,
    )


def _integer(row: dict[str, object], key: str, least: int | None = None) -> int:
    value = row.get(key)
    if type(value) is not int:
        raise ValueError(f"{key} is {value!r}, not an integer")
    if least is not None and value < least:
        raise ValueError(f"{key} is {value}, less than {least}")
    return value
