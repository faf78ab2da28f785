"""Clients of several conductors: they lose connections, and go on with the rest of their answers.

    client <--Told, Usage, Done, BatonError-- connection <-- a handler, as of HTTP or gRPC,
       |                                                      in the conductor's process
       '-- lost, silent or ended badly: again, with the last token, at the next conductor

When to come back, and after what pause, is what `baton.client` does. A conductor does not notice at
once that a client has gone.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from contextvars import Context
from dataclasses import dataclass

from baton.client.reconnect import may_go_on, pause_before
from baton.errors import BatonError, DeadlineExceeded, PeerGone
from baton.rpc.memory import MemoryDuplex, duplex_pair
from conductor.answer_run import Delta
from conductor.dispatch import Usage
from conductor.request import Ask
from conductor.resume import Bookmark
from sim.clients import CONDUCTOR_LOST, NO_END, SILENT, Failure, Story, wanted_by
from sim.cluster import Cluster, HostedConductor
from sim.log import EventLog
from sim.loop import SimLoop
from sim.plan import Habits
from sim.process import Process

FIRST_PATIENCE_S = 12.0  # without a first token
GRACE_S = 0.25  # after its deadline a client does not wait any more


@dataclass(frozen=True, slots=True)
class Told:
    """One event of a stream, with its id."""

    delta: Delta
    token: str


@dataclass(frozen=True, slots=True)
class Done:
    """The stream has ended well."""


Event = Told | Usage | Done | BatonError


@dataclass(frozen=True, slots=True)
class _Connection:
    """`near` is the client's end of it."""

    near: MemoryDuplex[object, Event]
    handler: asyncio.Task[None]
    process: Process


class Caller:
    """One client, from its first connection to its last."""

    def __init__(self, story: Story, cluster: Cluster, loop: SimLoop, log: EventLog) -> None:
        habits = story.client.habits
        assert habits is not None
        self._story = story
        self._habits: Habits = habits
        self._cluster = cluster
        self._loop = loop
        self._log = log
        self._name = story.client.name
        self._ask: Ask = wanted_by(story.client)
        self._conductors = [machine.name for machine in cluster.shape.conductors]
        self._at = habits.first
        self._breaks = list(habits.breaks)
        self._twice = habits.twice
        self._token: str | None = None
        self._made: list[_Connection] = []
        self._ghosts: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Until the story has an end."""
        story = self._story
        story.note_progress()
        until = story.began + story.client.deadline_s + GRACE_S
        try:
            async with asyncio.timeout_at(until):
                await self._until_answered()
        except TimeoutError:
            self._end(NO_END, "the client waits no longer")
        story.ended = self._loop.now
        self._log.note(self._name, "ends", f"{story.code} {story.message}")

    async def forgotten(self) -> None:
        """Return when no conductor works for any of its connections."""
        for task in self._ghosts:
            await asyncio.wait([task])
        for one in self._made:
            await asyncio.wait([one.handler, one.process.gone], return_when=asyncio.FIRST_COMPLETED)
            if one.handler.done() and not one.handler.cancelled() and one.handler.exception():
                self._log.violation(f"{self._name} broke: {one.handler.exception()!r}")

    async def _until_answered(self) -> None:
        story, failures = self._story, 0
        while not story.code:
            name = self._conductors[self._at]
            began, known = self._loop.now, len(story.tokens)
            try:
                await self._listen(name)
            except BatonError as error:
                failures = 1 if len(story.tokens) > known else failures + 1
                if failures == 1:
                    story.failures.clear()
                silent = isinstance(error, _Silent)
                code = CONDUCTOR_LOST if isinstance(error, PeerGone) else error.code
                code = SILENT if silent else code
                story.failures.append(Failure(story.client, name, code, began, self._loop.now))
                if silent:
                    story.silences.append(story.failures[-1])
                self._log.note(self._name, "lost", f"{name}: {code} {error.message}")
                count = len(self._conductors)
                if not may_go_on(error, silent, self._token is not None, failures, count):
                    story.ends += code not in (CONDUCTOR_LOST, SILENT)
                    self._end(code, error.message)
                    return
                if not (isinstance(error, _OwnBreak) and self._habits.stays):
                    self._at = (self._at + 1) % count
                await asyncio.sleep(pause_before(error, failures, count, 0.75))
                self._haunt()

    async def _listen(self, name: str) -> None:
        """To one connection. Raises what ended it, unless the story has an end."""
        story = self._story
        connection = self._connect(name)
        try:
            while not story.code:
                if story.tired.is_set():
                    self._end("cancelled")
                    return
                self._hear(await self._next(connection))
        finally:
            self._loop.call_later(
                self._habits.unnoticed_s, self._leave, connection, context=Context()
            )

    async def _next(self, connection: _Connection) -> Event:
        patience_s = FIRST_PATIENCE_S if self._token is None else self._habits.patience_s
        if self._breaks and len(self._story.tokens) >= self._breaks[0]:
            del self._breaks[0]
            raise _OwnBreak("the client's connection broke")
        try:
            async with asyncio.timeout(patience_s):
                return await connection.near.receive()
        except TimeoutError:
            raise _Silent(f"nothing came for {patience_s:g} s") from None

    def _hear(self, event: Event) -> None:
        story = self._story
        match event:
            case Told(delta, token):
                self._token = token
                story.hear(delta, self._log)
                story.note_progress()
            case Usage():
                story.usage = event
            case Done():
                self._end("ok")
            case BatonError():
                raise event

    def _end(self, code: str, message: str = "") -> None:
        self._story.code, self._story.message = code, message

    def _haunt(self) -> None:
        """The same reconnect reaches another conductor, too, from which nobody reads."""
        if self._twice is None or self._token is None:
            return
        after_s, self._twice = self._twice, None
        self._ghosts.append(asyncio.create_task(self._be_ghost(after_s, self._token)))

    async def _be_ghost(self, after_s: float, token: str) -> None:
        name = self._conductors[(self._at + 1) % len(self._conductors)]
        await asyncio.sleep(after_s)
        with suppress(PeerGone):
            ghost = self._connect(name, token)
            await asyncio.sleep(self._habits.unnoticed_s)
            self._leave(ghost)

    def _connect(self, name: str, token: str | None = None) -> _Connection:
        """Raises PeerGone."""
        hosted = self._cluster.conductors.get(name)
        if hosted is None:
            raise PeerGone(f"nobody listens at {name}")
        near: MemoryDuplex[object, Event]
        near, far = duplex_pair(self._name, name, self._cluster.network, lambda: self._loop.now)
        left_s = self._story.began + self._story.client.deadline_s - self._loop.now
        token = token or self._token
        self._log.note(self._name, "asks", f"{name} {token}")
        work = _serve(hosted, self._ask, max(left_s, 0.001), token, far)
        connection = _Connection(near, hosted.process.spawn(work, self._name), hosted.process)
        hosted.process.gone.add_done_callback(lambda _: near.cut(f"{name} is gone"))
        self._made.append(connection)
        return connection

    def _leave(self, connection: _Connection) -> None:
        connection.handler.cancel()
        connection.near.cut("the client has gone")


class _OwnBreak(PeerGone):
    """Not the conductor's fault."""


class _Silent(DeadlineExceeded):
    """Nothing was heard for longer than the client's patience."""


async def _serve(
    hosted: HostedConductor,
    ask: Ask,
    timeout_s: float,
    token: str | None,
    far: MemoryDuplex[Event, object],
) -> None:
    """Runs as the conductor's process, like the handler of an HTTP request."""
    service = hosted.service
    try:
        request = await service.prepare(ask, "sim", timeout_s, token)
        bookmark = Bookmark(request)
        async with aclosing(service.generate(request)) as answer:
            async for part in answer:
                if isinstance(part, Usage):
                    await far.send(part)
                    continue
                for delta in part:
                    bookmark.note(delta)
                    await far.send(Told(delta, bookmark.token))
        await far.send(Done())
    except BatonError as error:
        with suppress(PeerGone):
            await far.send(error)
    finally:
        await far.aclose()
