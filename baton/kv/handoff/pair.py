"""The decode worker's end of one stream to one prefill worker, shared by all its attempts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from baton.errors import BatonError, InternalError, PeerGone, StaleAttempt, TransportError
from baton.kv.handoff.options import HandoffOptions, check_hello
from baton.kv.identity import Identity, is_ttl, life
from baton.kv.transport.base import Transport
from baton.rpc.errors import from_wire
from baton.rpc.services import Duplex, HandoffDialer
from baton.types.fleet import Peer
from baton.types.handoff import DecodeMessage, Hello, PrefillMessage, Refused, Renew
from baton.types.request import AttemptId

Inbox = asyncio.Queue[PrefillMessage | BatonError]
"""What a fetch hears: messages of its attempt, or the error that ended the stream."""

RENEWALS_PER_TTL = 3


class Pair:
    """`run` dials, greets and then delivers messages until the stream ends; its owner awaits it.
    Attempts open an inbox once `ready` and close it when they are done."""

    def __init__(
        self,
        peer: Peer,
        identity: Identity,
        transport: Transport,
        dialer: HandoffDialer,
        options: HandoffOptions,
    ) -> None:
        self.peer = peer
        self.key = life(peer.name, peer.incarnation)
        # Per peer: reads from one that stands still must hold up no others.
        self.slots = asyncio.Semaphore(options.max_reads)
        self._identity = identity
        self._transport = transport
        self._dialer = dialer
        self._options = options
        self._stream: Duplex[DecodeMessage, PrefillMessage] | None = None
        self._ready = asyncio.Event()
        self._failure: BatonError | None = None
        self._inboxes: dict[AttemptId, Inbox] = {}

    async def ready(self) -> None:
        """Return when both sides have greeted. Raises what prevented it."""
        await self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def open(self, attempt: AttemptId) -> Inbox:
        if self._failure is not None:
            raise self._failure
        if attempt in self._inboxes:
            raise StaleAttempt(f"{attempt} is being fetched from {self.peer.name} already")
        inbox = self._inboxes[attempt] = Inbox()
        return inbox

    def close(self, attempt: AttemptId) -> None:
        """The attempt is renewed no more, and messages for it are dropped."""
        self._inboxes.pop(attempt, None)

    async def send(self, message: DecodeMessage) -> None:
        if self._stream is None:
            raise InternalError("a message was sent before the stream was ready")
        await self._stream.send(message)

    async def break_off(self) -> None:
        """End the stream, and with it all attempts of the pair and every read from the peer."""
        if self._stream is not None:
            await self._stream.aclose()

    async def run(self, on_end: Callable[[Pair], None]) -> None:
        """Never raises because of the peer: attempts learn of it through their inboxes."""
        failure: BatonError = PeerGone(f"the stream to {self.peer.name} was closed here")
        try:
            ttl_s = await self._greet()
            self._ready.set()
            async with asyncio.TaskGroup() as tasks:
                renewals = tasks.create_task(self._renew(ttl_s / RENEWALS_PER_TTL))
                failure = await self._deliver()
                renewals.cancel()
        except BatonError as error:
            failure = error
        except TimeoutError:
            failure = PeerGone(f"{self.peer.name} at {self.peer.address} did not answer in time")
        finally:
            self._failure = failure
            self._ready.set()
            for inbox in self._inboxes.values():
                inbox.put_nowait(failure)
            on_end(self)
            await self._hang_up()

    async def _greet(self) -> float:
        """Dial and exchange Hellos; the peer's lease ttl in seconds."""
        timeout_s = self._options.hello_timeout_s
        async with asyncio.timeout(timeout_s):
            self._stream = await self._dialer.pair(self.peer.address, timeout_s)
            us = self._identity
            await self._stream.send(
                Hello(
                    us.name,
                    us.incarnation,
                    us.layout,
                    self._transport.name,
                    self._transport.endpoint(),
                    expected_incarnation=self.peer.incarnation,
                )
            )
            hello = await self._stream.receive()
            if isinstance(hello, Refused):
                raise from_wire(hello.error)
            if not isinstance(hello, Hello) or not is_ttl(hello.lease_ttl_s):
                raise TransportError(f"{self.peer.name} answered a greeting with {hello!r}")
            if (hello.worker, hello.incarnation) != (self.peer.name, self.peer.incarnation):
                raise PeerGone(
                    f"{self.peer.address} is {life(hello.worker, hello.incarnation)}, "
                    f"not {self.key}: the worker was restarted"
                )
            check_hello(us, self._transport.name, hello)
            await self._transport.connect(self.key, hello.endpoint)
        return hello.lease_ttl_s

    async def _deliver(self) -> BatonError:
        """Sort messages into inboxes until the stream ends; then why it did."""
        if self._stream is None:
            raise InternalError("the stream is not there after greeting")
        while True:
            try:
                message = await self._stream.receive()
            except PeerGone as error:
                return error
            if isinstance(message, Hello):
                return PeerGone(f"{self.peer.name} said Hello twice")
            if message.attempt is None:
                return from_wire(message.error)
            inbox = self._inboxes.get(message.attempt)
            if inbox is not None:  # else it was given up while the message was under way
                inbox.put_nowait(message)

    async def _renew(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            if self._inboxes:
                try:
                    await self.send(Renew(tuple(self._inboxes)))
                except PeerGone:
                    return  # `_deliver` notices too

    async def _hang_up(self) -> None:
        await self._transport.disconnect(self.key)
        if self._stream is not None:
            await self._stream.aclose()
