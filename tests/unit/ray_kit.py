"""A Place of pretended machines and processes, for the supervisor in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.ray.commands import Listening
from baton.ray.config import ClusterConfig, parse_config
from baton.ray.keeper import NodeGone
from baton.ray.place import Command, Ended, Node, PlaceLost
from baton.ray.placement import free_on, room

NODE_A = Node("a" * 8, "10.0.0.1", {"CPU": 8, "GPU": 2, "prefill": 2})
NODE_B = Node("b" * 8, "10.0.0.2", {"CPU": 8, "GPU": 2, "decode": 4})
DRAIN_S = 2.0  # that a pretended process takes to end


def config(**more: Any) -> ClusterConfig:
    content = {
        "pools": {"prefill": {"resources": {"prefill": 1}}, "decode": {"resources": {"decode": 1}}}
    }
    return parse_config({**content, **more}, "test")


@dataclass
class Recorder:
    """Keeps what it is told."""

    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def event(self, event: str, text: str, /, **fields: Any) -> None:
        self.events.append((event, {"text": text, **fields}))

    def result(self, event: str, text: str, **fields: Any) -> None:
        self.event(event, text, **fields)

    def names(self) -> list[str]:
        return [event for event, _ in self.events]

    def said(self, event: str) -> list[str]:
        return [fields["text"] for name, fields in self.events if name == event]


class FakeRunning:
    def __init__(self, place: FakePlace, node: Node, command: Command) -> None:
        self.node = node
        self.command = command
        self.began = asyncio.get_running_loop().time()
        self.ended: asyncio.Future[Ended | PlaceLost] = asyncio.get_running_loop().create_future()
        self.stubborn = False  # it does not end by SIGTERM
        self._place = place

    def die(self, code: int = -9, tail: tuple[str, ...] = ()) -> None:
        if not self.ended.done():
            self.ended.set_result(Ended(code, tail))

    def lose(self) -> None:
        if not self.ended.done():
            self.ended.set_result(PlaceLost("the actor died"))

    async def wait(self) -> Ended:
        result = await asyncio.shield(self.ended)
        if isinstance(result, PlaceLost):
            raise result
        return result

    async def announcement(self, timeout_s: float) -> dict[str, Any]:
        async with asyncio.timeout(timeout_s):
            await asyncio.sleep(1.0 if self._place.announces else 1e9)
        ports = (flag(self.command, name) for name in ("--port", "--grpc-port"))
        http, grpc = (self._place.next_port() if port == "0" else port for port in ports)
        return {
            "http": f"0.0.0.0:{http}",
            "grpc": f"0.0.0.0:{grpc}",
            "for_workers": f"0.0.0.0:{grpc}",
            "scheme": "http",
        }

    async def stop(self, grace_s: float) -> None:
        self._place.log.append(("stop", self.command.name))
        if self.stubborn:
            await asyncio.sleep(grace_s)
            self.die(-9)
            return
        await asyncio.sleep(min(DRAIN_S, grace_s))
        self.die(0)

    async def kill(self) -> None:
        self._place.log.append(("kill", self.command.name))
        self.die(-9)


class FakeSlot:
    def __init__(
        self, place: FakePlace, name: str, bundle: Mapping[str, float], only: Node | None = None
    ) -> None:
        self.name = name
        self.bundle = bundle
        self.at: Node | None = only
        self._place = place
        self._only = only

    async def node(self) -> Node:
        while True:
            if self.at is not None and self.at in self._place.alive:
                return self.at
            if self._only is not None:
                raise NodeGone("the node has gone")
            self.at = self._place.find(self.bundle)
            if self.at is None:
                await asyncio.sleep(0.5)

    async def start(self, command: Command) -> FakeRunning:
        await asyncio.sleep(self._place.start_s)
        if self.at is None or self.at not in self._place.alive:
            raise PlaceLost("the node died")
        return self._place.begin(self.at, command)

    async def free_port(self) -> int:
        await self.node()
        return self._place.next_port()

    async def release(self) -> None:
        self.at = None
        self._place.slots.remove(self)


class FakePlace:
    """Slots are given in order, on the first node with room."""

    def __init__(self, *nodes: Node) -> None:
        self.alive = list(nodes or (NODE_A, NODE_B))
        self.slots: list[FakeSlot] = []
        self.log: list[tuple[str, str]] = []
        self.lives: list[FakeRunning] = []
        self.start_s = 1.0
        self.announces = True
        self.on_begin: Callable[[FakeRunning], None] = lambda _: None
        self._port = 40000

    async def reserve(
        self, name: str, count: int, bundle: Mapping[str, float], strategy: str
    ) -> Sequence[FakeSlot]:
        made = [FakeSlot(self, name, bundle) for _ in range(count)]
        self.slots += made
        return made

    async def on(self, name: str, node: Node, bundle: Mapping[str, float]) -> FakeSlot:
        self.slots.append(FakeSlot(self, name, bundle, only=node))
        return self.slots[-1]

    async def nodes(self) -> Sequence[Node]:
        return list(self.alive)

    def find(self, bundle: Mapping[str, float]) -> Node | None:
        for node in self.alive:
            held = [slot.bundle for slot in self.slots if slot.at is node]
            if room(bundle, free_on(node, held)):
                return node
        return None

    def begin(self, node: Node, command: Command) -> FakeRunning:
        running = FakeRunning(self, node, command)
        self.lives.append(running)
        self.log.append(("start", command.name))
        self.on_begin(running)
        return running

    def next_port(self) -> int:
        self._port += 2
        return self._port

    def lose(self, node: Node) -> None:
        """The machine dies, and everything on it."""
        self.alive.remove(node)
        for running in self.running:
            if running.node is node:
                running.lose()

    @property
    def running(self) -> list[FakeRunning]:
        return [life for life in self.lives if not life.ended.done()]

    def names(self) -> list[str]:
        return sorted(life.command.name for life in self.running)

    def find_life(self, name: str) -> FakeRunning:
        (found,) = [life for life in self.running if life.command.name == name]
        return found

    def assert_empty(self) -> None:
        assert not self.running
        assert not self.slots


class FakeAsks:
    """Conductors that know of all processes of the place, some time after they began."""

    def __init__(self, place: FakePlace, register_s: float = 1.0) -> None:
        self.wanted: dict[str, int] | None = None
        self.silent = False
        self._place = place
        self._register_s = register_s

    async def cluster(self, conductor: Listening) -> Mapping[str, Any]:
        if self.silent:
            return {}
        now = asyncio.get_running_loop().time()
        live = [
            {"name": life.command.name, "state": "live"}
            for life in self._place.running
            if now - life.began >= self._register_s
        ]
        conductors = [{"wanted": self.wanted} if self.wanted else {}]
        return {"conductors": conductors, "workers": live}

    async def ready(self, conductor: Listening) -> bool:
        return not self.silent


def flag(command: Command, name: str) -> str:
    """The value that a command has for a flag, or an empty text."""
    args = command.args
    return args[args.index(name) + 1] if name in args else ""
