"""One simulation from start to end: a spec and requests in, a `Result` out."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sim.fleet.clients import Clients
from sim.fleet.datacentre import Datacentre
from sim.fleet.prompts import Prompts
from sim.fleet.records import Event, Record, Table, table_of
from sim.fleet.result import Result
from sim.fleet.sampler import Sampler
from sim.fleet.spec import FleetSpec
from sim.fleet.totals import totals
from sim.loop import STEPS_AT_A_TIME, SimLoop
from sim.workload.trace import Request

SAMPLE_S = 10.0
STEPS_OF_WORKER = 50_000  # at one moment: at the end, each closes its streams to all the others

Progress = Callable[[int, float], None]
"""Told after every request that has ended: how many have, and what the simulated time is."""


def simulate(
    spec: FleetSpec,
    requests: Iterator[Request],
    workload: Mapping[str, Any],
    progress: Progress = lambda ended, now: None,
    sample_s: float = SAMPLE_S,
) -> Result:
    """`workload` says in the result what the requests are."""
    loop = SimLoop(max(STEPS_AT_A_TIME, STEPS_OF_WORKER * (spec.prefill + spec.decode)))
    try:
        with _rarely_collected(), _quiet():
            ran = loop.run_until_complete(_run(spec, requests, progress, sample_s))
    finally:
        loop.close()
    sampler, records, events = ran
    return Result(
        spec.as_json(),
        workload,
        totals(records, sampler.workers, spec.slo_ttft_s, spec.slo_tbt_s),
        records,
        sampler.workers,
        sampler.links,
        events,
    )


async def _run(
    spec: FleetSpec, requests: Iterator[Request], progress: Progress, sample_s: float
) -> tuple[Sampler, Table[Record], Table[Event]]:
    loop = asyncio.get_running_loop()
    records = Table(Record)

    async with Datacentre(spec) as datacentre:
        began = loop.time()

        def note(record: Record) -> None:
            records.append(record)
            progress(len(records), loop.time() - began)

        front = datacentre.hardware.machine
        clients = Clients(datacentre.conductor, Prompts(spec.grain), note, front)
        sampler = Sampler(datacentre, began)
        sampling = loop.create_task(sampler.run(sample_s), name="sampler")
        await clients.run(requests)
        sampling.cancel()
        sampler.sample()
        events = table_of(Event, [Event(at - began, text) for at, text in datacentre.roles])
    return sampler, records, events


@contextmanager
def _rarely_collected() -> Iterator[None]:
    """Hardly anything here is a cycle: to look for them often takes time for nothing."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


@contextmanager
def _quiet() -> Iterator[None]:
    """Of processes that say what they do, there are many."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
