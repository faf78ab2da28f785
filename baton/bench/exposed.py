"""How much of a handoff is not hidden behind prefill, in a running disaggregated cluster.

    prefill worker   |---- queue ----|--- prefill: chunk, chunk, chunk ---|
    transfer                              |-- read --|-- read --|-- read --|
    first token                                                   TTFT -->|
                                                                          |<- exposed ->| released

Blocks are read while later chunks and layers are still being computed. What remains after the
prompt's last layer, until the decode worker holds and has verified everything, is exposed: the
second token waits for it. It is the prefill worker's `handoff` span of the request's trace.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from baton.client.http import Client, Prompt
from baton.errors import ConfigError

TRACE_S = 10.0  # a worker's last spans reach the conductor a little after the answer


@dataclass(frozen=True, slots=True)
class Exposure:
    """Medians over the requests of one prompt length. Seconds."""

    input_tokens: int
    requests: int
    ttft_s: float  # received by the conductor to first token
    prefill_s: float
    exposed_s: float
    share_of_ttft: float  # median of the requests' own exposed / TTFT


@dataclass(frozen=True, slots=True)
class _Sample:
    ttft_s: float
    prefill_s: float
    exposed_s: float


async def measure(
    url: str,
    lengths: Sequence[int],
    requests: int,
    vocab_size: int,
    progress: Callable[[int, int], None],
    api_key: str = "",
    tls: ssl.SSLContext | None = None,
) -> tuple[Exposure, ...]:
    """One request at a time, lengths in turn. Raises ConfigError when nothing is handed over."""
    draw = random.Random(len(lengths))
    samples: dict[int, list[_Sample]] = {length: [] for length in lengths}
    async with Client(url, api_key=api_key, tls=tls) as client:
        await _ask(client, draw, min(lengths), vocab_size)  # connections of the first handoff
        for number in range(requests):
            for done, length in enumerate(lengths, number * len(lengths) + 1):
                samples[length].append(await _ask(client, draw, length, vocab_size))
                progress(done, requests * len(lengths))
    return tuple(_summarize(length, taken) for length, taken in samples.items())


async def _ask(client: Client, draw: random.Random, length: int, vocab_size: int) -> _Sample:
    tokens = tuple(draw.randrange(vocab_size) for _ in range(length))
    prompt = Prompt(tokens, max_tokens=4, options={"temperature": 0.0, "ignore_eos": True})
    request_id = ""
    async for piece in client.stream(prompt):
        request_id = piece.request_id or request_id
    async with asyncio.timeout(TRACE_S):
        while True:
            if (sample := _sample(await client.trace(request_id))) is not None:
                return sample
            await asyncio.sleep(0.02)


def _sample(trace: Mapping[str, Any]) -> _Sample | None:
    """None while spans are still on their way."""
    if all(attempt["prefill"] is None for attempt in trace["attempts"]):
        raise ConfigError(
            "the cluster computed the prompt on a decode worker: nothing was handed over; "
            "measure one that has prefill workers"
        )
    prefill_workers = {attempt["prefill"] for attempt in trace["attempts"]}
    seconds = {
        span["name"]: span["end_s"] - span["start_s"]
        for span in trace["spans"]
        if span["source"] in prefill_workers or span["name"] == "first_token"
    }
    if not {"first_token", "prefill", "handoff"} <= seconds.keys():
        return None
    return _Sample(seconds["first_token"], seconds["prefill"], seconds["handoff"])


def _summarize(length: int, samples: Sequence[_Sample]) -> Exposure:
    return Exposure(
        length,
        len(samples),
        statistics.median(s.ttft_s for s in samples),
        statistics.median(s.prefill_s for s in samples),
        statistics.median(s.exposed_s for s in samples),
        statistics.median(s.exposed_s / s.ttft_s for s in samples),
    )


def table(exposures: Sequence[Exposure]) -> Table:
    title = "Transfer that is not hidden behind prefill, medians, ms"
    drawn = Table(title=title)
    for column in ("prompt tokens", "TTFT", "prefill", "exposed", "share of TTFT"):
        drawn.add_column(column, justify="right")
    for e in exposures:
        drawn.add_row(
            f"{e.input_tokens}",
            f"{e.ttft_s * 1e3:.1f}",
            f"{e.prefill_s * 1e3:.1f}",
            f"{e.exposed_s * 1e3:.1f}",
            f"{e.share_of_ttft:.1%}",
        )
    return drawn
