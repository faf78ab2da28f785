"""Where processes can be put: what the supervisor needs of Ray, and nothing else of it.

Place --reserve--> Slot (room for one process; knows its node) --start--> Running
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from baton.errors import BatonError


class StartFailed(BatonError):
    """The cluster could not be placed or started, or could not be kept alive."""

    code = "start_failed"


class PlaceLost(BatonError):
    """The machine, or the actor on it, that a process ran in is gone; the process with it."""

    code = "place_lost"
    retryable = True


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the Ray cluster. `total` is what it was started with, by resource."""

    id: str
    ip: str
    total: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of this node in baton's fleet. Several nodes may share an address in tests."""
        return f"{self.ip}-{self.id[:6]}"


@dataclass(frozen=True, slots=True)
class Command:
    """A process to start: the arguments of `python -m`, and variables beside the node's own."""

    name: str
    args: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ended:
    """`code` is negative for the signal that ended it; `tail` are its last lines."""

    code: int
    tail: tuple[str, ...] = ()


class Running(Protocol):
    """A process that was started. `wait` is called once, and owns it."""

    async def wait(self) -> Ended:
        """Until the process has ended. Raises PlaceLost."""

    async def announcement(self, timeout_s: float) -> dict[str, Any]:
        """What it printed about its addresses. Raises TimeoutError or PlaceLost."""

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after `grace_s`; returns when it has ended, and never raises."""

    async def kill(self) -> None:
        """At once; never raises."""


class Slot(Protocol):
    """Room for one process. After `release` it must not be used."""

    async def node(self) -> Node:
        """Where it is; waits while it is being placed, or placed anew because a node died."""

    async def start(self, command: Command) -> Running:
        """Raises PlaceLost."""

    async def free_port(self) -> int:
        """A port that nobody uses there now. Raises PlaceLost."""

    async def release(self) -> None: ...


class Place(Protocol):
    async def reserve(
        self, name: str, count: int, bundle: Mapping[str, float], strategy: str
    ) -> Sequence[Slot]:
        """Ask for room; the slots wait for it."""

    async def on(self, name: str, node: Node, bundle: Mapping[str, float]) -> Slot:
        """Room on that very node. Its `node` raises PlaceLost when the node has gone."""

    async def nodes(self) -> Sequence[Node]:
        """Those that are alive."""


class Events(Protocol):
    """Where the supervisor says what happens."""

    def event(self, event: str, text: str, /, **fields: Any) -> None: ...

    def result(self, event: str, text: str, **fields: Any) -> None: ...


async def sleep_unless(event: asyncio.Event, seconds: float) -> bool:
    """Sleep, but not longer than until `event`; whether it is set."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
    return event.is_set()
