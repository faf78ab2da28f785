"""A conductor's link: what it passes on, and to whom."""

from __future__ import annotations

import asyncio

from baton.rpc.memory import duplex_pair
from baton.rpc.services import Duplex
from baton.types.fleet import WorkerLoad
from baton.types.kv_events import KvEvents, KvSnapshot, Tier
from baton.types.link import ConductorMessage, Resync, StepReport, WorkerMessage
from conductor.link import Link


async def test_kv_messages_and_reports_go_to_their_listeners_and_a_resync_to_the_worker() -> None:
    near: Duplex[ConductorMessage, WorkerMessage]
    near, far = duplex_pair("conductor", "worker")
    loads: list[WorkerLoad] = []
    heard: list[KvEvents | KvSnapshot] = []
    link = Link("worker", near, loads.append, heard.append)
    running = asyncio.create_task(link.run())
    told = [
        KvSnapshot(4, Tier.GPU, bytes(16), first=True, last=True),
        KvEvents(5, Tier.CPU, added=bytes(16)),
    ]
    await far.send(told[0])
    await far.send(StepReport((), WorkerLoad(running=3)))
    await far.send(told[1])
    link.post(Resync())
    assert await far.receive() == Resync()
    await far.aclose()
    await running
    assert heard == told
    assert loads == [WorkerLoad(running=3)]
    link.post(Resync())  # the link has ended: nobody hears it, and nothing breaks
