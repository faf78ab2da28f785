"""Who has the cores: one server at a time runs, the others are parked (or not started)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from bench.process import StartError


class Parkable(Protocol):
    """A server as turns need it. `start` and `wake` raise StartError."""

    @property
    def alive(self) -> bool: ...
    async def start(self) -> None: ...
    def park(self) -> None: ...
    async def wake(self) -> None: ...
    async def stop(self) -> None: ...


Each = TypeVar("Each", bound=Parkable)


@dataclass
class Turns(Generic[Each]):
    """`make(name)` gives a server that is not started. With `restart`, servers are ended instead of
    parked, and each turn starts anew.

    Between calls at most one server runs: `running`.
    """

    make: Callable[[str], Each]
    restart: bool = False
    running: str | None = None
    restarts: dict[str, int] = field(default_factory=dict)  # because parking was not survived
    _servers: dict[str, Each] = field(default_factory=dict)

    async def take(self, name: str) -> Each:
        """The server `name`, running and warm; every other one is parked.

        Raises StartError when it cannot be started.
        """
        if self.running != name:
            await self.rest()
        if (server := self._servers.get(name)) is not None:
            try:
                if not server.alive:
                    raise StartError(f"{name} has ended")
                self.running = name
                await server.wake()
            except StartError:
                await self._end(name)
                self.restarts[name] = self.restarts.get(name, 0) + 1
            else:
                return server
        server = self._servers[name] = self.make(name)
        self.running = name
        try:
            await server.start()
        except StartError:
            await self._end(name)
            raise
        return server

    async def close(self) -> None:
        """End every server."""
        for name in list(self._servers):
            await self._end(name)

    def names(self) -> Sequence[str]:
        """Servers that are there, parked or running."""
        return tuple(self._servers)

    async def rest(self) -> None:
        """Park whoever runs: nobody has the cores."""
        if self.running is None:
            return
        if self.restart:
            await self._end(self.running)
        else:
            self._servers[self.running].park()
            self.running = None

    async def _end(self, name: str) -> None:
        server = self._servers.pop(name)
        if self.running == name:
            self.running = None
        await server.stop()
