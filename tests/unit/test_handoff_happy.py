"""Handoffs that succeed, however prefill, attach and reads are ordered in time."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from baton.errors import BatonError
from baton.kv.digest import SHORT, Verify, hashed_bytes
from baton.kv.handoff.leases import Ending
from baton.kv.handoff.options import HandoffOptions
from baton.kv.transport.loopback import Fault
from baton.types.request import AttemptId, WireError
from tests.unit.handoff_kit import (
    FIRST,
    LAYOUT,
    OPTIONS,
    TTL,
    DecodeSide,
    PrefillSide,
    cluster,
    same,
)
from tests.virtual_time import settle, virtual_time

A = AttemptId("a")
REMOTE = (3, 4, 9)
LOCAL = (20, 7, 8)


def arrived(decode: DecodeSide, prefill: PrefillSide) -> bool:
    return all(
        same(decode.block(mine), prefill.block(theirs))
        for mine, theirs in zip(LOCAL, REMOTE, strict=True)
    )


@virtual_time
async def test_kv_published_before_the_attach_is_read_and_released() -> None:
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()
        prefill.publish(A, REMOTE)
        prefill.publisher.prefilled(A, FIRST, 3, cached_tokens=8)
        fetched = await decode.fetch(A, prefill.peer, LOCAL)
        assert arrived(decode, prefill)
        assert fetched.prefilled.first == FIRST
        assert fetched.prefilled.cached_tokens == 8
        assert fetched.blocks == LOCAL
        assert fetched.stats.nbytes == 3 * LAYOUT.block_bytes
        assert prefill.released == [A]
        assert prefill.endings == [(A, Ending.RELEASED)]
        assert not prefill.publisher.live()
        assert not decode.quarantined


@virtual_time
async def test_chunks_and_layer_groups_are_read_while_prefill_still_runs() -> None:
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()
        prefill.publisher.expect(A)
        fetching = asyncio.create_task(decode.fetch(A, prefill.peer, LOCAL))
        await asyncio.sleep(1)
        for first in (0, 1):
            blocks = REMOTE[:1] if first == 0 else REMOTE[1:]
            for layers in ((0, 2), (2, 4)):
                prefill.publish(A, blocks, [layers], first)
                await asyncio.sleep(1)
        assert arrived(decode, prefill)  # nothing is left to read when prefill ends
        prefill.publisher.prefilled(A, FIRST, 3)
        fetched = await fetching
        assert fetched.stats.ranges == 4
        assert fetched.stats.exposed_s == 0
        assert prefill.endings == [(A, Ending.RELEASED)]


class Slow:
    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s

    def on_read(self, reader: str, source: str, nbytes: int) -> Fault:
        return Fault(delay_s=self.delay_s)


@virtual_time
async def test_renewals_keep_the_lease_through_slow_prefill_and_slow_reads() -> None:
    async with cluster(Slow(3 * TTL)) as c:
        prefill, decode = await c.prefill(), await c.decode()
        fetching = asyncio.create_task(decode.fetch(A, prefill.peer, LOCAL, timeout_s=1000))
        await asyncio.sleep(1)
        prefill.publish(A, REMOTE[:1])
        await asyncio.sleep(5 * TTL)
        prefill.publish(A, REMOTE[1:], first_block=1)
        prefill.publisher.prefilled(A, FIRST, 3)
        fetched = await fetching
        assert arrived(decode, prefill)
        assert fetched.stats.exposed_s == pytest.approx(3 * TTL)


@virtual_time
async def test_the_lease_is_renewed_while_decode_waits_for_blocks() -> None:
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()
        prefill.publish(A, REMOTE)
        prefill.publisher.prefilled(A, FIRST, 3)
        await decode.fetch(A, prefill.peer, LOCAL, timeout_s=1000, reserve_s=5 * TTL)
        assert arrived(decode, prefill)
        assert prefill.endings == [(A, Ending.RELEASED)]


@pytest.mark.parametrize("cached", [0, 1, 2, 3])
@virtual_time
async def test_what_the_decode_worker_has_is_not_read(cached: int) -> None:
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()
        for block in LOCAL[:cached]:
            decode.block(block)[:] = 7  # its own, which may differ in rounding
        prefill.publish(A, REMOTE[:2])
        prefill.publish(A, REMOTE[2:], first_block=2)
        prefill.publisher.prefilled(A, FIRST, 3)
        fetched = await decode.fetch(A, prefill.peer, LOCAL, cached=cached)
        assert fetched.stats.nbytes == (3 - cached) * LAYOUT.block_bytes
        assert all((decode.block(block) == 7).all() for block in LOCAL[:cached])
        for ours, theirs in zip(LOCAL[cached:], REMOTE[cached:], strict=True):
            assert same(decode.block(ours), prefill.block(theirs))
        assert prefill.endings == [(A, Ending.RELEASED)]


@virtual_time
async def test_one_stream_carries_many_attempts_at_once() -> None:
    async with cluster(Slow(0.5)) as c:
        prefill, decode = await c.prefill(), await c.decode()
        dialled = 0
        serve = prefill.publisher.serve

        async def count(stream: object) -> None:
            nonlocal dialled
            dialled += 1
            await serve(stream)  # type: ignore[arg-type]

        prefill.pair = count  # type: ignore[method-assign]
        attempts = [AttemptId(f"r{n}") for n in range(20)]
        for n, attempt in enumerate(attempts):
            prefill.publish(attempt, (n,))
            prefill.publisher.prefilled(attempt, FIRST, 1)
        await asyncio.gather(
            *(decode.fetch(a, prefill.peer, (31 - n,)) for n, a in enumerate(attempts))
        )
        assert dialled == 1
        assert all(same(decode.block(31 - n), prefill.block(n)) for n in range(11))
        assert {how for _, how in prefill.endings} == {Ending.RELEASED}
        assert len(prefill.endings) == 20


@virtual_time
async def test_two_decode_workers_read_from_two_prefill_workers() -> None:
    async with cluster() as c:
        prefills = [await c.prefill(f"p{n}") for n in range(2)]
        decodes = [await c.decode(f"d{n}") for n in range(2)]
        fetches = []
        for i, prefill in enumerate(prefills):
            for j, decode in enumerate(decodes):
                attempt = AttemptId(f"{i}{j}")
                prefill.publish(attempt, (j,))
                prefill.publisher.prefilled(attempt, FIRST, 1)
                fetches.append(decode.fetch(attempt, prefill.peer, (i,)))
        await asyncio.gather(*fetches)
        for i, prefill in enumerate(prefills):
            assert [how for _, how in prefill.endings] == [Ending.RELEASED] * 2
            assert all(same(d.block(i), prefill.block(j)) for j, d in enumerate(decodes))


@virtual_time
async def test_the_source_serves_only_while_something_is_attached() -> None:
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()
        source = next(t for t in c.fabric.members.values() if t._worker == "p0")
        prefill.publish(A, (1,))
        assert source._served == 0
        fetching = asyncio.create_task(decode.fetch(A, prefill.peer, (2,)))
        await settle()
        assert source._served == 1
        prefill.publisher.prefilled(A, FIRST, 1)
        await fetching
        assert source._served == 0
        aborted = AttemptId("b")
        prefill.publish(aborted, (1,))
        fetching = asyncio.create_task(decode.fetch(aborted, prefill.peer, (2,)))
        await settle()
        fetching.cancel()
        await settle()
        assert prefill.endings[-1] == (aborted, Ending.ABORTED)
        assert source._served == 1  # what it reads must be able to come to its end
        await asyncio.sleep(OPTIONS.linger_s)
        assert source._served == 0


@pytest.mark.parametrize("verify", list(Verify))
def test_every_verification_mode_hands_over(verify: Verify) -> None:
    @virtual_time
    async def run() -> None:
        async with cluster(options=HandoffOptions(verify=verify)) as c:
            prefill, decode = await c.prefill(), await c.decode()
            prefill.publish(A, REMOTE, [(2, 4), (0, 2)])
            prefill.publisher.prefilled(A, FIRST, 3)
            await decode.fetch(A, prefill.peer, LOCAL)
            assert arrived(decode, prefill)

    run()


async def test_long_digests_are_made_in_threads_and_keep_the_order() -> None:
    options = HandoffOptions(verify=Verify.FULL, inline_digest_bytes=LAYOUT.block_bytes)
    async with cluster(options=options) as c, asyncio.timeout(20):
        prefill, decode = await c.prefill(), await c.decode()
        prefill.publish(A, REMOTE[:2])  # more than one block: a thread
        prefill.publish(A, REMOTE[2:], first_block=2)  # one block, but behind the other two
        prefill.publisher.prefilled(A, FIRST, 3)
        fetched = await decode.fetch(A, prefill.peer, LOCAL)
        assert arrived(decode, prefill)
        assert fetched.prefilled.first == FIRST
        assert prefill.endings == [(A, Ending.RELEASED)]


async def test_long_digests_of_an_attempt_that_has_ended_are_not_said() -> None:
    options = HandoffOptions(verify=Verify.FULL, inline_digest_bytes=0)
    refusal = WireError("cancelled", "gone")
    async with cluster(options=options) as c, asyncio.timeout(20):
        prefill, decode = await c.prefill(), await c.decode()
        prefill.publish(A, REMOTE)
        prefill.publisher.finish_without_handoff(A, refusal)
        with pytest.raises(BatonError, match="gone"):
            await decode.fetch(A, prefill.peer, LOCAL)
        again = AttemptId("b")
        prefill.publish(again, REMOTE)
        prefill.publisher.prefilled(again, FIRST, 3)
        await decode.fetch(again, prefill.peer, LOCAL)
        assert arrived(decode, prefill)
        assert prefill.endings == [(A, Ending.REFUSED), (again, Ending.RELEASED)]


@pytest.mark.parametrize("mode", Verify)
@pytest.mark.parametrize("block_size", [4, 4096])
def test_what_digests_cost_is_known(mode: Verify, block_size: int) -> None:
    layout = replace(LAYOUT, block_size=block_size)
    run = 2 * layout.layer_bytes
    nbytes = hashed_bytes(layout, 3, 2, mode)
    if mode is Verify.OFF:
        assert nbytes == 0
    elif mode is Verify.FULL or run <= SHORT:
        assert nbytes == 3 * run
    else:
        assert 0 < nbytes < run
