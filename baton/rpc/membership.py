"""A worker's place in the fleet: register, renew a lease, register again when it was lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from baton.errors import BatonError, LayoutMismatch, ProtocolMismatch, Unauthenticated
from baton.rpc.services import FleetService
from baton.types.fleet import FleetLease, WorkerInfo, WorkerLoad

log = logging.getLogger("baton.rpc.membership")

REFUSALS = (LayoutMismatch, ProtocolMismatch, Unauthenticated)  # waiting cannot mend them
FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0


class Membership:
    """Keeps one worker registered with one conductor while `run` runs.

    The lease is renewed every third of its time to live, so two renewals may fail before it ends.
    """

    def __init__(
        self,
        fleet: FleetService,
        info: WorkerInfo,
        load: Callable[[], WorkerLoad],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called when `registered` has been set or cleared."""
        self._fleet = fleet
        self._info = info
        self._load = load
        self._on_change = on_change
        self.registered = asyncio.Event()
        self._leaving = False
        self._renew_now = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled, or forgotten after `leave`. Raises one of REFUSALS."""
        while not self._leaving:
            lease = await self._register()
            self.registered.set()
            self._on_change()
            log.info("registered name=%s incarnation=%s", self._info.name, self._info.incarnation)
            await self._renew_while_accepted(lease)
            self.registered.clear()
            self._on_change()

    def renew_now(self) -> None:
        """Not only when it is time: the conductor may have been started again, and know nobody."""
        self._renew_now.set()

    async def leave(self) -> None:
        """Tell the conductor that this worker goes. One try: the lease ends by itself otherwise.

        `run` goes on renewing, so that what is still running here is not taken for lost, but
        does not register again.
        """
        self._leaving = True
        try:
            await self._fleet.leave(self._info.name, self._info.incarnation)
        except BatonError as error:
            log.info("could not say goodbye to the conductor: %s", error.message)

    async def _register(self) -> FleetLease:
        delay = FIRST_RETRY_S
        while True:
            try:
                lease = await self._fleet.register(self._info)
                if lease.accepted:
                    return lease
                log.warning("the conductor did not accept the registration; trying again")
            except REFUSALS:
                raise
            except BatonError as error:
                log.warning("cannot register, trying again in %g s: %s", delay, error.message)
            await asyncio.sleep(delay)
            delay = min(2 * delay, LAST_RETRY_S)

    async def _renew_while_accepted(self, lease: FleetLease) -> None:
        """Return when the conductor says that it does not know us, or the lease has run out."""
        loop = asyncio.get_running_loop()
        expires = loop.time() + lease.ttl_s
        missed = 0
        while loop.time() < expires:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(lease.ttl_s / 3):
                    await self._renew_now.wait()
            self._renew_now.clear()
            try:
                lease = await self._fleet.renew(
                    self._info.name, self._info.incarnation, self._load()
                )
            except BatonError as error:
                missed += 1
                # One alone harms nothing, and is normal while a cluster shuts down.
                level = logging.INFO if missed == 1 else logging.WARNING
                log.log(level, "cannot renew the lease: %s", error.message)
                continue
            missed = 0
            if not lease.accepted:
                return
            expires = loop.time() + lease.ttl_s
