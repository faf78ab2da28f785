"""At most one server has the cores; what does not survive parking is started anew."""

from __future__ import annotations

import pytest

from bench.process import StartError, Stat, descendants
from bench.turns import Turns


class FakeServer:
    def __init__(self, name: str, world: World) -> None:
        self.name, self.world, self.state = name, world, "new"

    @property
    def alive(self) -> bool:
        return self.state in ("running", "parked")

    async def start(self) -> None:
        assert self.state == "new"
        if self.name in self.world.broken:
            raise StartError("broken")
        self.world.started.append(self.name)
        self._to("running")

    def park(self) -> None:
        assert self.state == "running"
        self._to("parked")

    async def wake(self) -> None:
        assert self.alive
        if self.name in self.world.fragile and self.state == "parked":
            raise StartError("asleep for too long")
        self._to("running")

    async def stop(self) -> None:
        self._to("ended")

    def _to(self, state: str) -> None:
        self.state = state
        assert sum(server.state == "running" for server in self.world.servers) <= 1


class World:
    """What the servers of a test share."""

    def __init__(self) -> None:
        self.servers: list[FakeServer] = []
        self.started: list[str] = []
        self.broken: set[str] = set()
        self.fragile: set[str] = set()

    def make(self, name: str) -> FakeServer:
        self.servers.append(FakeServer(name, self))
        return self.servers[-1]

    def states(self) -> list[str]:
        return [server.state for server in self.servers]


@pytest.fixture
def world() -> World:
    return World()


async def test_servers_are_parked_and_woken(world: World) -> None:
    turns = Turns(world.make)
    for name in ("a", "b", "a", "a", "b"):
        server = await turns.take(name)
        assert (server.name, server.state, turns.running) == (name, "running", name)
    assert world.started == ["a", "b"]
    await turns.rest()
    assert world.states() == ["parked", "parked"]
    assert turns.running is None
    await turns.close()
    assert world.states() == ["ended", "ended"]
    assert turns.restarts == {}


async def test_restart_parks_none(world: World) -> None:
    turns = Turns(world.make, restart=True)
    for name in ("a", "b", "a"):
        await turns.take(name)
    assert world.started == ["a", "b", "a"]
    assert world.states() == ["ended", "ended", "running"]


async def test_what_does_not_wake_is_started_anew(world: World) -> None:
    turns = Turns(world.make)
    world.fragile.add("a")
    for name in ("a", "b", "a"):
        await turns.take(name)
    assert world.started == ["a", "b", "a"]
    assert turns.restarts == {"a": 1}
    assert world.states() == ["ended", "parked", "running"]


async def test_what_has_died_is_started_anew(world: World) -> None:
    turns = Turns(world.make)
    (await turns.take("a")).state = "died"
    assert (await turns.take("a")).alive
    assert turns.restarts == {"a": 1}


async def test_what_cannot_start_leaves_nothing(world: World) -> None:
    turns = Turns(world.make)
    await turns.take("a")
    world.broken.add("b")
    with pytest.raises(StartError):
        await turns.take("b")
    assert world.states() == ["parked", "ended"]
    assert (await turns.take("a")).state == "running"
    await turns.close()
    assert world.states() == ["ended", "ended"]


def test_descendants_are_found_by_parent_and_by_session() -> None:
    def stat(pid: int, parent: int, session: int, state: str = "S") -> Stat:
        return Stat(pid, state, parent, session, 0.0)

    stats = [
        stat(10, 1, 10),
        stat(13, 12, 99),  # below one that is listed later, in a session of its own
        stat(12, 10, 12),
        stat(14, 1, 10),  # its parent has died
        stat(15, 10, 10, state="Z"),
        stat(20, 1, 20),
    ]
    assert {found.pid for found in descendants([10], stats)} == {10, 12, 13, 14}
