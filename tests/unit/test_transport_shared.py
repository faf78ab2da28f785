"""Several users of one transport, each with connections of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from baton.errors import InternalError, TransportError
from baton.kv.transport.base import Copy
from baton.kv.transport.loopback import Fault, FaultPlan
from baton.kv.transport.shared import SharedTransport, TransportView
from tests.unit.transport_kit import TransportPair, transport_pair
from tests.virtual_time import settle, virtual_time, within

ALL = [Copy(0, 0, 64)]


@asynccontextmanager
async def two_views(
    plan: FaultPlan | None = None,
) -> AsyncIterator[tuple[TransportPair, TransportView, TransportView]]:
    """Of the reader's transport, both connected to the source, which serves."""
    async with transport_pair("loopback", plan) as pair:
        await pair.reader.disconnect("source/1")
        shared = SharedTransport(pair.reader)
        one, other = shared.view(), shared.view()
        await one.connect("source/1", pair.source.endpoint())
        await other.connect("source/1", pair.source.endpoint())
        with pair.source.serving("reader/1"):
            yield pair, one, other


@virtual_time
async def test_a_peer_stays_connected_as_long_as_one_view_needs_it() -> None:
    async with two_views() as (pair, one, other):
        await one.disconnect("source/1")
        await one.disconnect("source/1")
        with pytest.raises(TransportError, match="source/1"):
            one.read("source/1", ALL)
        await other.read("source/1", ALL).wait()
        assert np.array_equal(pair.local[:64], pair.remote[:64])
        await other.close()
        with pytest.raises(TransportError):
            pair.reader.read("source/1", ALL)


@virtual_time
async def test_connecting_anew_leaves_the_other_views_reads_alone() -> None:
    class Slow:
        def on_read(self, reader: str, source: str, nbytes: int) -> Fault:
            return Fault(delay_s=5)

    async with two_views(Slow()) as (pair, one, other):
        reading = other.read("source/1", ALL)
        await one.disconnect("source/1")
        await one.connect("source/1", pair.source.endpoint())
        await reading.wait()


class Hang:
    """Only the first read."""

    def __init__(self) -> None:
        self.reads = 0

    def on_read(self, reader: str, source: str, nbytes: int) -> Fault:
        self.reads += 1
        return Fault(hang=self.reads == 1)


@virtual_time
async def test_a_read_that_hangs_ends_when_its_view_disconnects_and_others_go_on() -> None:
    async with two_views(Hang()) as (_, one, other):
        hanging = one.read("source/1", ALL)
        waiting = asyncio.create_task(hanging.wait())
        await settle()
        await one.disconnect("source/1")
        with pytest.raises(TransportError):
            await waiting
        await within(1, hanging.abort())
        await within(1, other.read("source/1", ALL).wait())


@virtual_time
async def test_views_that_come_and_go_at_once_end_up_connected_or_not() -> None:
    async with two_views() as (pair, one, other):
        endpoint = pair.source.endpoint()
        for _ in range(5):
            await asyncio.gather(one.disconnect("source/1"), other.connect("source/1", endpoint))
            await asyncio.gather(one.connect("source/1", endpoint), other.disconnect("source/1"))
            await within(1, one.read("source/1", ALL).wait())
        await one.close()
        assert not one._shared._connections


@virtual_time
async def test_a_refused_endpoint_leaves_nothing_behind() -> None:
    async with two_views() as (_, one, _other):
        with pytest.raises(TransportError):
            await one.connect("stranger/1", b"nobody")
        with pytest.raises(TransportError):
            one.read("stranger/1", ALL)
        with pytest.raises(InternalError):
            one.allocate(1)
        assert list(one._shared._connections) == ["source/1"]
