"""The in-memory adapter: the same promises as gRPC, and a fault plan, in virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from baton.errors import PeerGone
from baton.rpc.memory import Fault, MemoryNetwork, duplex_pair
from baton.rpc.pipe import Pipe
from baton.rpc.services import Duplex
from baton.types.blocks import Ask, BlocksMessage, LendEnd
from baton.types.fleet import FleetLease, KvLayout, Role, WorkerInfo, WorkerLoad
from baton.types.handoff import Attach, DecodeMessage, PrefillMessage, Released
from baton.types.link import Cancel, ConductorMessage, Drain, StepReport, WorkerMessage
from baton.types.request import AttemptId
from tests.virtual_time import run_virtual

LAYOUT = KvLayout("ab", "float32", 2, 2, 16, 32)
INFO = WorkerInfo("w", Role.DECODE, "i1", "w:1", 7, "demo", LAYOUT, 8, 64, "loopback")
REPORT = StepReport((), WorkerLoad())


@dataclass
class Plan:
    """Answers with the fault given for a message type or a method, else with none."""

    messages: dict[type, Fault] = field(default_factory=dict)
    calls: dict[str, Fault] = field(default_factory=dict)

    def on_message(self, sender: str, receiver: str, message: object) -> Fault:
        return self.messages.get(type(message), Fault())

    def on_call(self, caller: str, callee: str, method: str) -> Fault:
        return self.calls.get(method, Fault())


class EchoWorker:
    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def link(self, stream: Duplex[WorkerMessage, ConductorMessage]) -> None:
        try:
            while True:
                await stream.receive()
                await stream.send(REPORT)
        except PeerGone:
            self.ended.set()


class Prefill:
    async def pair(self, stream: Duplex[PrefillMessage, DecodeMessage]) -> None:
        message = await stream.receive()
        assert isinstance(message, Attach)
        await stream.send(Released(message.attempt))


class Store:
    async def pair(self, stream: Duplex[BlocksMessage, BlocksMessage]) -> None:
        message = await stream.receive()
        assert isinstance(message, Ask)
        await stream.send(LendEnd(message.number, 0))


class Fleet:
    def __init__(self) -> None:
        self.calls: list[str] = []

    async def register(self, info: WorkerInfo) -> FleetLease:
        self.calls.append(info.name)
        return FleetLease(True, 3.0)

    async def renew(self, name: str, incarnation: str, load: WorkerLoad) -> FleetLease:
        await asyncio.sleep(100)
        return FleetLease(True, 3.0)

    async def leave(self, name: str, incarnation: str) -> None:
        self.calls.append("leave")


async def test_a_full_pipe_makes_writers_wait_in_turn() -> None:
    pipe: Pipe[int] = Pipe(2)

    async def write() -> None:
        for number in range(6):
            await pipe.put(number)
        pipe.end("done")

    async with asyncio.TaskGroup() as group:
        group.create_task(write())
        assert [await pipe.get() for _ in range(6)] == list(range(6))
    with pytest.raises(PeerGone, match="done"):
        await pipe.get()
    with pytest.raises(PeerGone, match="done"):
        await pipe.put(7)


async def test_ending_a_pipe_wakes_a_waiting_writer() -> None:
    pipe: Pipe[int] = Pipe(1)
    await pipe.put(1)
    writer = asyncio.create_task(pipe.put(2))
    await asyncio.sleep(0)
    pipe.end("gone")
    with pytest.raises(PeerGone):
        await writer
    assert await pipe.get() == 1


async def test_what_was_sent_before_the_end_is_delivered() -> None:
    near: Duplex[int, str]
    near, far = duplex_pair("a", "b")
    await near.send(1)
    await near.send(2)
    await near.aclose()
    await near.aclose()
    assert [await far.receive(), await far.receive()] == [1, 2]
    for refused in (far.receive(), far.send("x"), near.receive(), near.send(3)):
        with pytest.raises(PeerGone):
            await refused


def test_delays_pass_in_virtual_time_and_never_reorder() -> None:
    async def scenario() -> None:
        plan = Plan(messages={int: Fault(delay_s=3600.0)})
        near: Duplex[object, object]
        near, far = duplex_pair("a", "b", plan)
        begun = asyncio.get_running_loop().time()
        await near.send(1)
        await near.send("prompt")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await far.receive()
        assert await far.receive() == 1
        assert asyncio.get_running_loop().time() == pytest.approx(begun + 3600)
        assert await far.receive() == "prompt"

    run_virtual(scenario())


def test_what_is_under_way_when_a_connection_is_lost_is_lost_with_it() -> None:
    async def scenario() -> None:
        plan = Plan(messages={int: Fault(delay_s=3600.0)})
        near: Duplex[object, object]
        near, far = duplex_pair("a", "b", plan)
        await near.send("arrived")
        await near.send(1)
        asyncio.get_running_loop().call_later(5.0, near.cut, "cable pulled")
        assert await far.receive() == "arrived"
        with pytest.raises(PeerGone, match="cable"):
            await far.receive()
        assert asyncio.get_running_loop().time() == pytest.approx(5.0)

    run_virtual(scenario())


async def test_a_message_can_be_lost_alone() -> None:
    near: Duplex[object, object]
    near, far = duplex_pair("a", "b", Plan(messages={str: Fault(skip=True)}))
    await near.send("lost")
    await near.send(1)
    assert await far.receive() == 1


async def test_a_broken_stream_ends_both_sides() -> None:
    near: Duplex[object, object]
    near, far = duplex_pair("a", "b", Plan(messages={str: Fault(lose=True)}))
    await near.send(1)
    with pytest.raises(PeerGone, match="broke"):
        await near.send("lost")
    assert await far.receive() == 1
    with pytest.raises(PeerGone, match="broke"):
        await far.receive()


async def test_worker_links_and_kill() -> None:
    worker = EchoWorker()
    async with MemoryNetwork() as network:
        network.add_worker("w:1", worker)
        dialer = network.worker_dialer("c")
        stream = await dialer.link("w:1", 1.0)
        await stream.send(Cancel(AttemptId("r"), "test"))
        assert await stream.receive() == REPORT
        network.kill("w:1")
        with pytest.raises(PeerGone, match="w:1 is gone"):
            await stream.receive()
        await worker.ended.wait()
        with pytest.raises(PeerGone):
            await dialer.link("w:1", 1.0)


async def test_closing_the_network_awaits_its_services() -> None:
    worker = EchoWorker()
    async with MemoryNetwork() as network:
        network.add_worker("w:1", worker)
        await (await network.worker_dialer("c").link("w:1", 1.0)).send(Drain())
    assert worker.ended.is_set()


async def test_handoffs_end_when_their_service_returns() -> None:
    async with MemoryNetwork() as network:
        network.add_handoff("p:1", Prefill())
        stream = await network.handoff_dialer("d").pair("p:1", 1.0)
        await stream.send(Attach(AttemptId("r")))
        assert await stream.receive() == Released(AttemptId("r"))
        with pytest.raises(PeerGone):
            await stream.receive()


async def test_blocks_streams_reach_their_service_until_it_is_killed() -> None:
    async with MemoryNetwork() as network:
        network.add_blocks("s:1", Store())
        dialer = network.blocks_dialer("w")
        stream = await dialer.pair("s:1", 1.0)
        await stream.send(Ask(1, bytes(16)))
        assert await stream.receive() == LendEnd(1, 0)
        network.kill("s:1")
        with pytest.raises(PeerGone):
            await dialer.pair("s:1", 1.0)


def test_calls_have_deadlines_and_faults() -> None:
    async def scenario() -> None:
        plan = Plan()
        fleet = Fleet()
        async with MemoryNetwork(plan) as network:
            network.add_fleet("c:1", fleet)
            client = network.fleet_client("w", "c:1")
            assert (await client.register(INFO)).accepted
            with pytest.raises(PeerGone, match="in time"):
                await client.renew("w", "i1", WorkerLoad())
            plan.calls["leave"] = Fault(lose=True)
            with pytest.raises(PeerGone, match="cannot be reached"):
                await client.leave("w", "i1")
            assert fleet.calls == ["w"]
            plan.calls["leave"] = Fault(lose_answer=True)
            with pytest.raises(PeerGone, match="was lost"):
                await client.leave("w", "i1")
            assert fleet.calls == ["w", "leave"]
            plan.calls["link"] = Fault(delay_s=9.0)
            network.add_worker("w:1", EchoWorker())
            with pytest.raises(PeerGone):
                await network.worker_dialer("c").link("w:1", 1.0)

    run_virtual(scenario())
