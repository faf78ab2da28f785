"""Membership in virtual time: states, leases, links, layouts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from baton.errors import LayoutMismatch, PeerGone, WorkerLost
from baton.rpc.memory import Fault, MemoryNetwork
from baton.types.fleet import BlockState, Role, WorkerLoad, WorkerState
from baton.types.link import StartDecode
from baton.types.request import AttemptId, AttemptOutput, GenerationTask, SamplingParams
from conductor.fleet import Fleet
from conductor.link import Assignment, Stage
from tests.fake_worker import FINGERPRINT, FakeWorker, Meeting, layout, say, worker_info
from tests.virtual_time import settle, stand_still, virtual_time

TTL = 9.0
D0 = worker_info("d0", Role.DECODE)
BUSY = WorkerLoad(running=3, blocks=((BlockState.ACTIVE, 3),))


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.outputs: list[AttemptOutput] = []
        self.lost: list[str] = []

    def on_output(self, duty: Role, worker: str, output: AttemptOutput) -> None:
        self.outputs.append(output)

    def on_lost(
        self, duty: Role, worker: str, attempt: AttemptId, stage: Stage, reason: str
    ) -> None:
        self.lost.append(f"{duty} {worker} {attempt}: {reason}")


@asynccontextmanager
async def fleet_and_network() -> AsyncIterator[tuple[Fleet, MemoryNetwork]]:
    async with MemoryNetwork() as network:
        fleet = Fleet(network.worker_dialer("conductor"), TTL, FINGERPRINT)
        running = asyncio.create_task(fleet.run())
        await asyncio.sleep(0)
        try:
            yield fleet, network
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def state_of(fleet: Fleet, name: str = "d0") -> WorkerState | None:
    found = [view.state for view in fleet.view().workers if view.info.name == name]
    return found[0] if found else None


def task_for(number: int = 0) -> GenerationTask:
    return GenerationTask(AttemptId("r", number), (1, 2, 3), SamplingParams(max_tokens=9))


def start(fleet: Fleet, heard: Heard, number: int = 0) -> None:
    task = task_for(number)
    peer = fleet.view().workers[0].peer
    fleet.start(peer, task.attempt, Assignment(Role.DECODE, heard, 3), StartDecode(task))


async def join(fleet: Fleet, network: MemoryNetwork, **script: object) -> FakeWorker:
    worker = FakeWorker(D0, say("abc", **script), Meeting())
    network.add_worker(D0.address, worker)
    await fleet.register(D0)
    await settle()
    return worker


@virtual_time
async def test_joining_live_suspect_dead_forgotten() -> None:
    async with fleet_and_network() as (fleet, network):
        lease = await fleet.register(D0)
        assert (lease.accepted, lease.ttl_s) == (True, TTL)
        assert state_of(fleet) is WorkerState.JOINING
        await asyncio.sleep(1)  # nobody answers at the address yet
        assert state_of(fleet) is WorkerState.JOINING
        network.add_worker(D0.address, FakeWorker(D0, say("x"), Meeting()))
        await asyncio.sleep(2)
        assert state_of(fleet) is WorkerState.LIVE
        await asyncio.sleep(4)
        assert state_of(fleet) is WorkerState.SUSPECT
        assert (await fleet.renew("d0", D0.incarnation, BUSY)).accepted
        assert state_of(fleet) is WorkerState.LIVE
        assert fleet.view().workers[0].load == BUSY
        await asyncio.sleep(TTL + 1)
        assert state_of(fleet) is WorkerState.DEAD
        assert not (await fleet.renew("d0", D0.incarnation, BUSY)).accepted
        await asyncio.sleep(70)
        assert state_of(fleet) is None


@virtual_time
async def test_reports_are_signs_of_life() -> None:
    async with fleet_and_network() as (fleet, network):
        worker = await join(fleet, network, hang_at=1)
        heard = Heard()
        for number in range(6):
            start(fleet, heard, number)
            await asyncio.sleep(TTL / 2)
        assert state_of(fleet) is WorkerState.LIVE
        assert len(worker.tasks) == 6
        assert fleet.view().workers[0].load.running == 6


@virtual_time
async def test_a_silent_worker_s_attempts_are_lost_when_its_lease_ends() -> None:
    async with fleet_and_network() as (fleet, network):
        await join(fleet, network, hang_at=0)
        heard = Heard()
        start(fleet, heard)
        await settle()
        view = fleet.view().workers[0]
        assert (view.own_attempts, view.own_prompt_tokens) == (1, 3)
        await asyncio.sleep(2 * TTL)
        assert heard.lost == [f"decode d0 r#0: no sign of life for {TTL:g} s"]
        with pytest.raises(WorkerLost):
            start(fleet, heard)


@virtual_time
async def test_a_conductor_that_stood_still_does_not_take_its_workers_for_dead() -> None:
    async with fleet_and_network() as (fleet, network):
        await join(fleet, network, hang_at=1)
        heard = Heard()
        start(fleet, heard)
        await settle()
        stand_still(10 * TTL)
        await asyncio.sleep(TTL / 4)
        assert state_of(fleet) is WorkerState.LIVE
        await asyncio.sleep(TTL)  # and still nothing is heard
        assert state_of(fleet) is WorkerState.DEAD
        assert len(heard.lost) == 1


@virtual_time
async def test_a_broken_link_loses_attempts_at_once_and_is_dialled_again() -> None:
    async with fleet_and_network() as (fleet, network):
        worker = await join(fleet, network, hang_at=1)
        heard = Heard()
        start(fleet, heard)
        await settle()
        network.kill(D0.address)
        await settle()
        assert len(heard.lost) == 1
        assert state_of(fleet) is WorkerState.SUSPECT
        network.add_worker(D0.address, worker)
        await asyncio.sleep(1)
        assert state_of(fleet) is WorkerState.LIVE
        assert not worker.live


@virtual_time
async def test_a_message_that_cannot_be_sent_loses_the_link_instead_of_blocking_it() -> None:
    async with fleet_and_network() as (fleet, network):
        await join(fleet, network)

        def unsendable(sender: str, receiver: str, message: object) -> Fault:
            if isinstance(message, StartDecode):
                raise ValueError("this cannot be encoded")
            return Fault()

        network.plan.on_message = unsendable  # type: ignore[method-assign]
        heard = Heard()
        start(fleet, heard)
        await settle()
        assert len(heard.lost) == 1


@virtual_time
async def test_a_restarted_worker_replaces_its_former_life() -> None:
    async with fleet_and_network() as (fleet, network):
        await join(fleet, network, hang_at=1)
        heard = Heard()
        start(fleet, heard)
        await settle()
        old_peer = fleet.view().workers[0].peer
        await fleet.register(replace(D0, incarnation="life-2"))
        await settle()
        assert "started again" in heard.lost[0]
        assert state_of(fleet) is WorkerState.LIVE
        assert not (await fleet.renew("d0", D0.incarnation, BUSY)).accepted
        task, assignment = task_for(1), Assignment(Role.DECODE, heard, 3)
        with pytest.raises(WorkerLost):
            fleet.start(old_peer, task.attempt, assignment, StartDecode(task))


@virtual_time
async def test_registering_twice_renews() -> None:
    async with fleet_and_network() as (fleet, network):
        worker = await join(fleet, network)
        await asyncio.sleep(TTL * 0.8)
        assert state_of(fleet) is WorkerState.SUSPECT
        await fleet.register(D0)
        assert state_of(fleet) is WorkerState.LIVE
        assert len(worker.links) == 1


@virtual_time
async def test_leaving_is_draining_until_the_link_ends() -> None:
    async with fleet_and_network() as (fleet, network):
        worker = await join(fleet, network, hang_at=1)
        heard = Heard()
        start(fleet, heard)
        await settle()
        await fleet.leave("d0", "another life")
        assert state_of(fleet) is WorkerState.LIVE
        await fleet.leave("d0", D0.incarnation)
        assert state_of(fleet) is WorkerState.DRAINING
        assert not heard.lost
        await worker.links[0].aclose()
        await settle()
        assert heard.lost
        assert state_of(fleet) is None


@virtual_time
async def test_a_draining_worker_that_renews_keeps_its_attempts() -> None:
    async with fleet_and_network() as (fleet, network):
        await join(fleet, network, hang_at=1)
        heard = Heard()
        start(fleet, heard)
        await settle()
        await fleet.leave("d0", D0.incarnation)
        for _ in range(6):
            await asyncio.sleep(TTL / 3)
            assert (await fleet.renew("d0", D0.incarnation, BUSY)).accepted
        assert not heard.lost
        assert state_of(fleet) is WorkerState.DRAINING


@virtual_time
async def test_leaving_before_the_link_is_up_forgets_the_worker() -> None:
    async with fleet_and_network() as (fleet, _):
        await fleet.register(D0)
        await fleet.leave("d0", D0.incarnation)
        assert state_of(fleet) is None


@virtual_time
async def test_layouts_must_match_and_the_error_names_both() -> None:
    async with fleet_and_network() as (fleet, network):
        with pytest.raises(LayoutMismatch, match=r"fingerprint eeee.*have ffff"):
            await fleet.register(replace(D0, layout=layout(model="e" * 32)))
        await join(fleet, network)
        other = worker_info("p0", Role.PREFILL, layout=layout(block_size=32))
        with pytest.raises(LayoutMismatch, match=r"p0 has .*block_size=32.*d0 .*block_size=16"):
            await fleet.register(other)
        assert state_of(fleet, "p0") is None
        await asyncio.sleep(2 * TTL)  # the first worker is dead: the next one decides
        await fleet.register(other)
        assert state_of(fleet, "p0") is WorkerState.JOINING


@virtual_time
async def test_capacity_is_the_largest_decode_pool() -> None:
    async with fleet_and_network() as (fleet, _):
        assert fleet.capacity() is None
        await fleet.register(worker_info("p0", Role.PREFILL))
        assert fleet.capacity() is None
        await fleet.register(worker_info("d1", Role.DECODE, num_blocks=4))
        await fleet.register(worker_info("d2", Role.DECODE, max_model_len=100))
        assert fleet.capacity() == 100


@virtual_time
async def test_cancelled_attempts_are_forgotten_even_without_a_last_word() -> None:
    async with fleet_and_network() as (fleet, network):
        worker = await join(fleet, network, hang_at=1)
        heard = Heard()
        start(fleet, heard)
        await settle()
        worker.live.clear()  # it has forgotten the attempt and says nothing
        peer = fleet.view().workers[0].peer
        fleet.cancel(peer, AttemptId("r", 0), "enough")
        fleet.cancel(peer, AttemptId("r", 0), "enough")
        await settle()
        assert worker.cancelled == [AttemptId("r", 0)]
        assert fleet.view().workers[0].own_attempts == 0
        for _ in range(10):
            await asyncio.sleep(TTL / 2)
            await fleet.renew("d0", D0.incarnation, BUSY)
        network.kill(D0.address)
        await settle()
        assert not heard.lost


@virtual_time
async def test_nothing_registers_while_the_fleet_does_not_run() -> None:
    async with MemoryNetwork() as network:
        fleet = Fleet(network.worker_dialer("conductor"), TTL)
        with pytest.raises(PeerGone):
            await fleet.register(D0)


@virtual_time
async def test_what_a_broken_link_left_decoding_is_cancelled_over_the_next_one() -> None:
    """The worker keeps it for another conductor; this one has made other arrangements."""
    async with fleet_and_network() as (fleet, network):
        worker = await join(fleet, network, hang_at=1)
        heard = Heard()
        start(fleet, heard, 0)
        start(fleet, heard, 1)
        await settle()
        fleet.cancel(fleet.view().workers[0].peer, AttemptId("r", 1), "not needed")
        await settle()
        await worker.links[-1].aclose()
        await asyncio.sleep(1)
        assert len(worker.links) == 2
        start(fleet, heard, 2)
        await settle()
        assert worker.cancelled.count(AttemptId("r", 0)) == 1
        assert AttemptId("r", 2) not in worker.cancelled
        await worker.links[-1].aclose()
        await asyncio.sleep(1)
        assert worker.cancelled.count(AttemptId("r", 0)) == 1
        assert worker.cancelled.count(AttemptId("r", 2)) == 1


@virtual_time
async def test_a_worker_that_computes_for_longer_than_predicted_does_not_look_idle() -> None:
    """It says nothing meanwhile: the view changes with time alone."""
    async with fleet_and_network() as (fleet, network):
        await join(fleet, network, hang_at=0)
        task = task_for()
        work = Assignment(Role.DECODE, Heard(), len(task.prompt), work_s=0.4)
        fleet.start(fleet.view().workers[0].peer, task.attempt, work, StartDecode(task))
        await settle()
        now = asyncio.get_running_loop().time
        seen = []
        for _ in range(9):
            seen.append(fleet.view().workers[0].queue_s(now(), (0, now())))
            await asyncio.sleep(0.1)
        assert seen[:3] == pytest.approx([0.4, 0.3, 0.2])
        assert all(0.07 < seconds <= 0.1 + 1e-9 for seconds in seen[3:])
