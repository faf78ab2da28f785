"""The NIXL transport's own parts: slicing, prepared lists, the thread around a scripted agent."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import ConfigError, TransportError
from baton.kv.transport import nixl_agent
from baton.kv.transport.base import Copy
from baton.kv.transport.nixl import SLICE, UNIT_MIN, NixlTransport, _indices, _pieces, _unit
from baton.kv.transport.nixl_agent import AgentThread, Job
from baton.kv.transport.registry import available, make_transport
from baton.kv.transport.transfer import PendingTransfer
from tests.unit.transport_kit import transport_pair

POOL = 1 << 30


@dataclass
class Handle:
    name: str
    released: bool = False

    def release(self) -> None:
        self.released = True


@dataclass
class ScriptedAgent:
    """Handles stay in progress until `finish` names their state."""

    posted: list[Handle] = field(default_factory=list)
    states: dict[str, str] = field(default_factory=dict)
    progress: int = 0
    threads: set[int] = field(default_factory=set)

    def transfer(self, handle: Handle) -> str:
        self.threads.add(threading.get_ident())
        self.posted.append(handle)
        return self.states.get(handle.name, "PROC")

    def check_xfer_state(self, handle: Handle) -> str:
        state = self.states.get(handle.name, "PROC")
        if state == "RAISE":
            raise RuntimeError("the backend is upset")
        return state

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        self.progress += 1
        return {}


@asynccontextmanager
async def running() -> AsyncIterator[tuple[AgentThread, ScriptedAgent]]:
    agent, thread = ScriptedAgent(), AgentThread("test")
    await thread.start(lambda: agent)
    try:
        yield thread, agent
    finally:
        await thread.stop()


def job(thread: AgentThread, *names: str, peer: str = "peer") -> tuple[Job, PendingTransfer]:
    transfer = PendingTransfer(peer, thread.kick)
    slices = iter([((lambda name=name: Handle(name)), 100) for name in names])  # type: ignore[misc]
    return Job(transfer, slices), transfer


async def until(condition: object) -> None:
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110 (set by a thread)
            await asyncio.sleep(0.001)


async def test_a_transfer_ends_when_its_last_slice_is_done() -> None:
    async with running() as (thread, agent):
        work, transfer = job(thread, "a", "b", "c")
        agent.states["a"] = "DONE"
        thread.submit(work)
        await until(lambda: len(agent.posted) == 3)
        assert not transfer.ended
        agent.states |= {"b": "DONE", "c": "DONE"}
        await asyncio.wait_for(transfer.wait(), 5)
        assert transfer.ended
        assert all(handle.released for handle in agent.posted)
        assert agent.threads != {threading.get_ident()}


@pytest.mark.parametrize("state", ["ERR", "RAISE"])
async def test_a_failed_slice_fails_the_transfer_once_the_others_are_idle(state: str) -> None:
    async with running() as (thread, agent):
        work, transfer = job(thread, "a", "b")
        thread.submit(work)
        await until(lambda: len(agent.posted) == 2)
        agent.states["a"] = state
        await asyncio.sleep(0.02)
        assert not transfer.ended  # b may still write
        agent.states["b"] = "DONE"
        with pytest.raises(TransportError, match="peer"):
            await asyncio.wait_for(transfer.wait(), 5)


async def test_abort_posts_nothing_more_and_waits_for_what_is_posted() -> None:
    async with running() as (thread, agent):
        work, transfer = job(thread, "a")
        thread.submit(work)
        await until(lambda: agent.posted)
        abort = asyncio.create_task(transfer.abort())
        await asyncio.sleep(0.02)
        assert not abort.done()
        agent.states["a"] = "DONE"
        await asyncio.wait_for(abort, 5)
        late, stopped = job(thread, "never")
        stopped.stop()
        thread.submit(late)
        await asyncio.wait_for(stopped.abort(), 5)
        assert [handle.name for handle in agent.posted] == ["a"]


async def test_a_transfer_without_progress_fails_but_stays_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nixl_agent, "STALL_S", 0.02)
    async with running() as (thread, agent):
        work, transfer = job(thread, "a")
        thread.submit(work)
        with pytest.raises(TransportError, match="no progress"):
            await asyncio.wait_for(transfer.wait(), 5)
        assert not transfer.ended
        agent.states["a"] = "DONE"
        await asyncio.wait_for(transfer.abort(), 5)


async def test_a_peer_that_stands_still_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "IN_FLIGHT", 200)
    async with running() as (thread, agent):
        stuck, _ = job(thread, "a", "b", "c")
        thread.submit(stuck)
        await until(lambda: len(agent.posted) == 2)
        other, transfer = job(thread, "d", peer="other")
        agent.states["d"] = "DONE"
        thread.submit(other)
        await asyncio.wait_for(transfer.wait(), 5)
        assert [handle.name for handle in agent.posted] == ["a", "b", "d"]
        agent.states |= dict.fromkeys("abc", "DONE")


async def test_waiting_behind_others_is_not_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "STALL_S", 30.0)
    async with running() as (thread, agent):
        work, transfer = job(thread, "a")
        work.moved_at -= 60.0  # it waited for a minute before its first slice was posted
        thread.submit(work)
        await until(lambda: agent.posted)
        await asyncio.sleep(0.02)
        agent.states["a"] = "DONE"
        await asyncio.wait_for(transfer.wait(), 5)


async def test_stopping_is_noticed_whenever_it_comes() -> None:
    async with running() as (thread, _):
        clear = thread._wake.clear

        def clear_late() -> None:  # the loop goes on between the thread's look and its clearing
            thread._stopping = True
            thread._wake.set()
            clear()

        thread._wake.clear = clear_late  # type: ignore[method-assign]
        thread.serve(0)  # wake it up
        worker = thread._thread
        assert worker is not None
        await asyncio.to_thread(worker.join, 2.0)
        assert not worker.is_alive()


async def test_an_idle_thread_sleeps_and_a_serving_one_makes_progress() -> None:
    async with running() as (thread, agent):
        await asyncio.sleep(0.02)
        assert agent.progress == 0
        thread.serve(1)
        await until(lambda: agent.progress > 3)
        thread.serve(-1)
        await asyncio.wrap_future(thread.call(lambda: None))
        seen = agent.progress
        cpu = time.thread_time()
        await asyncio.sleep(0.02)
        assert agent.progress <= seen + 1
        assert time.thread_time() - cpu < 1


async def test_errors_of_calls_reach_the_caller() -> None:
    async with running() as (thread, _):

        def fail() -> None:
            raise ValueError("bad")

        with pytest.raises(ValueError, match="bad"):
            await asyncio.wrap_future(thread.call(fail))


copies = st.lists(
    st.builds(
        Copy, st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.integers(1, 3 * SLICE // 2)
    ),
    min_size=1,
    max_size=6,
)


@given(copies)
def test_pieces_are_small_and_cover_the_copies_in_order(wanted: list[Copy]) -> None:
    groups = list(_pieces(wanted))
    assert all(sum(c.length for c in group) <= SLICE for group in groups)
    joined: list[Copy] = []
    for piece in (c for group in groups for c in group):
        last = joined[-1] if joined else None
        whole = (
            last is not None and last in wanted[: len(joined)] and last == wanted[len(joined) - 1]
        )
        if last is not None and not whole:
            assert piece.remote == last.remote + last.length
            assert piece.local == last.local + last.length
            joined[-1] = Copy(last.remote, last.local, last.length + piece.length)
        else:
            joined.append(piece)
    assert joined == wanted


def test_units_are_common_to_all_numbers_and_known_ones_are_used_again() -> None:
    unit = 4 * UNIT_MIN
    paged = [Copy(4 * unit, 0, 2 * unit), Copy(unit, 7 * unit, unit)]
    assert _unit(paged, {}, POOL) == unit
    assert _unit([Copy(0, 8 * unit, 4 * unit)], {unit: None}, POOL) == unit
    assert _unit([Copy(3, 8 * unit, 4 * unit)], {unit: None}, POOL) is None  # not aligned
    assert _unit(paged, {}, unit << 21) is None  # the lists would be too long
    assert _unit(paged, dict.fromkeys((3 * unit, 5 * unit, 7 * unit, 11 * unit)), POOL) is None
    local, remote = _indices(paged, unit)
    assert local.tolist() == [0, 1, 7]
    assert remote.tolist() == [4, 5, 1]


async def test_descriptor_lists_are_prepared_once_per_peer_and_unit() -> None:
    async with transport_pair("nixl") as pair:
        assert isinstance(pair.reader, NixlTransport)
        with pair.source.serving("reader/1"):
            for n in range(3):
                await pair.reader.read("source/1", [Copy(n * 8192, 8192, 8192)]).wait()
                await pair.reader.read("source/1", [Copy(5, n, 100)]).wait()
        assert list(pair.reader._sources["source/1"].prepared) == [8192]


async def test_without_nixl_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    transport = NixlTransport("worker")
    with pytest.raises(ConfigError, match="--transport shm"):
        await transport.start()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not available()[0].usable
    assert make_transport("auto", "worker").name == "shm"


def test_auto_prefers_nixl() -> None:
    assert make_transport("auto", "worker").name == "nixl"
