"""Traces for the simulator: read, written, and made faster, shorter, or uneven in time.

A `Request` in the simulator has an id for every block of its prompt, the last, partial one too:
`len(request.blocks) == blocks_of(request.input_tokens)`. Ids are chained: an id stands for a block
and everything before it, so two prompts with the same id at one place are the same up to there.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from baton.bench import trace
from baton.bench.trace import BLOCK_TOKENS
from baton.bench.trace import TraceRequest as Request
from baton.errors import ConfigError

__all__ = [
    "BLOCK_TOKENS",
    "LoadCurve",
    "Request",
    "blocks_of",
    "read_trace",
    "scaled",
    "trace_line",
]


def blocks_of(tokens: int) -> int:
    """How many blocks hold so many tokens, the last one perhaps not full."""
    return -(-tokens // BLOCK_TOKENS)


def read_trace(path: Path) -> list[Request]:
    """All requests in order of arrival, the first at 0, quantised arrivals spread. Prompts whose
    blocks were not recorded get ids of their own. Raises ConfigError, which names the line."""
    requests = trace.read_trace(path)
    start = requests[0].at_s
    fresh = itertools.count(1 + max((block for r in requests for block in r.blocks), default=-1))
    return [
        replace(
            request,
            at_s=request.at_s - start,
            blocks=(
                *request.blocks,
                *itertools.islice(fresh, blocks_of(request.input_tokens) - len(request.blocks)),
            ),
        )
        for request in requests
    ]


def trace_line(request: Request) -> bytes:
    """One line of a trace file. Times keep microseconds."""
    row: dict[str, object] = {
        "timestamp": round(request.at_s * 1e3, 3),
        "input_length": request.input_tokens,
        "output_length": request.output_tokens,
        "hash_ids": request.blocks,
    }
    if request.tenant:
        row["tenant"] = request.tenant
    if request.priority:
        row["priority"] = request.priority
    return orjson.dumps(row) + b"\n"


def scaled(
    requests: Iterable[Request],
    speed: float = 1.0,
    input_scale: float = 1.0,
    output_scale: float = 1.0,
) -> Iterator[Request]:
    """The same requests, `speed` times as fast, with longer or shorter prompts and answers. Prompts
    share the same part of their lengths as before."""
    for request in requests:
        tokens = max(1, round(request.input_tokens * input_scale))
        yield replace(
            request,
            at_s=request.at_s / speed,
            input_tokens=tokens,
            output_tokens=max(1, round(request.output_tokens * output_scale)),
            blocks=_scaled_blocks(request.blocks, blocks_of(tokens), input_scale),
        )


def _scaled_blocks(blocks: tuple[int, ...], count: int, scale: float) -> tuple[int, ...]:
    """A new block ends inside one recorded block, or where it ends: it is known by that one's id
    and by how many new blocks before it end there, too."""
    if scale == 1.0:
        return blocks
    last, most_per_block = len(blocks) - 1, math.ceil(scale) + 1
    ids: list[int] = []
    before, repeats = -1, 0
    for number in range(1, count + 1):
        source = min(last, math.ceil(number / scale) - 1)
        repeats = repeats + 1 if source == before else 0
        before = source
        ids.append(blocks[source] * most_per_block + repeats)
    return tuple(ids)


@dataclass(frozen=True, slots=True)
class LoadCurve:
    """How fast a trace is replayed, as time goes on: `speeds[i]` from `begins_s[i]` of the replay
    until the next entry, the last one for ever. `begins_s` ascends from 0."""

    begins_s: tuple[float, ...]
    speeds: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> LoadCurve:
        """`0:1,600:2.5`: as recorded for 600 s, then 2.5 times as fast. Raises ConfigError."""
        try:
            steps = [tuple(map(float, step.split(":", 1))) for step in text.split(",")]
            begins_s, speeds = (tuple(column) for column in zip(*steps, strict=True))
        except ValueError as error:
            raise ConfigError(f"load {text!r} is not like 0:1,600:2.5") from error
        if begins_s[0] != 0 or any(b <= a for a, b in itertools.pairwise(begins_s)):
            raise ConfigError(f"load {text!r}: seconds must ascend from 0")
        if not all(0 < speed < math.inf for speed in speeds):
            raise ConfigError(f"load {text!r}: speeds must be above 0")
        return cls(begins_s, speeds)

    def applied(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The same requests at other times, in the same order."""
        reached = self._reached()
        for request in requests:
            step = bisect.bisect_right(reached, request.at_s) - 1
            at_s = self.begins_s[step] + (request.at_s - reached[step]) / self.speeds[step]
            yield replace(request, at_s=at_s)

    def _reached(self) -> Sequence[float]:
        """How many seconds of the trace have been replayed when each step begins."""
        lengths = (after - before for before, after in itertools.pairwise(self.begins_s))
        done = (length * speed for length, speed in zip(lengths, self.speeds, strict=False))
        return [0.0, *itertools.accumulate(done)]
