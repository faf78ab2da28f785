"""Membership: registers, renews in time, registers again when forgotten, gives up when hopeless."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from baton.errors import LayoutMismatch, PeerGone, Unauthenticated
from baton.rpc.membership import Membership
from baton.types.fleet import FleetLease, KvLayout, Role, WorkerInfo, WorkerLoad
from tests.virtual_time import virtual_time

LAYOUT = KvLayout("ab", "float32", 2, 2, 16, 32)
INFO = WorkerInfo("w", Role.DECODE, "i1", "w:1", 7, "demo", LAYOUT, 8, 64, "loopback")
TTL_S = 9.0


class Fleet:
    """Notes (what, when) and fails or forgets on demand."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []
        self.fail: Exception | None = None
        self.known = True

    def _note(self, what: str) -> None:
        self.calls.append((what, asyncio.get_running_loop().time()))
        if self.fail is not None:
            raise self.fail

    async def register(self, info: WorkerInfo) -> FleetLease:
        self._note("register")
        assert info is INFO
        self.known = True
        return FleetLease(True, TTL_S)

    async def renew(self, name: str, incarnation: str, load: WorkerLoad) -> FleetLease:
        self._note("renew")
        assert (name, incarnation, load.running) == ("w", "i1", 3)
        return FleetLease(self.known, TTL_S)

    async def leave(self, name: str, incarnation: str) -> None:
        self._note("leave")


@asynccontextmanager
async def member_of(fleet: Fleet) -> AsyncIterator[Membership]:
    membership = Membership(fleet, INFO, lambda: WorkerLoad(running=3))
    task = asyncio.create_task(membership.run())
    try:
        yield membership
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@virtual_time
async def test_renews_every_third_of_the_lease() -> None:
    fleet = Fleet()
    async with member_of(fleet) as membership:
        await membership.registered.wait()
        await asyncio.sleep(7)
    assert fleet.calls == [("register", 0.0), ("renew", 3.0), ("renew", 6.0)]


@virtual_time
async def test_registers_again_when_the_conductor_forgot() -> None:
    fleet = Fleet()
    async with member_of(fleet):
        await asyncio.sleep(1)
        fleet.known = False  # the conductor was restarted
        await asyncio.sleep(3)
    assert [what for what, _ in fleet.calls] == ["register", "renew", "register"]


@virtual_time
async def test_keeps_trying_while_the_conductor_is_away() -> None:
    fleet = Fleet()
    fleet.fail = PeerGone("not yet")
    async with member_of(fleet) as membership:
        await asyncio.sleep(60)
        assert not membership.registered.is_set()
        assert 25 < len(fleet.calls) < 45
        fleet.fail = None
        await asyncio.sleep(2.1)
        assert membership.registered.is_set()


@virtual_time
async def test_one_failed_renewal_is_harmless_and_a_lost_lease_is_registered_again() -> None:
    fleet = Fleet()
    async with member_of(fleet) as membership:
        await asyncio.sleep(1)
        fleet.fail = PeerGone("away")
        await asyncio.sleep(3)  # one renewal failed
        assert membership.registered.is_set()
        await asyncio.sleep(7)
        assert not membership.registered.is_set()
        fleet.fail = None
        await asyncio.sleep(3)
        assert membership.registered.is_set()
    assert fleet.calls[-1][0] == "register"


@pytest.mark.parametrize("error", [LayoutMismatch("other layout"), Unauthenticated("token")])
def test_hopeless_refusals_end_the_membership(error: Exception) -> None:
    @virtual_time
    async def scenario() -> None:
        fleet = Fleet()
        fleet.fail = error
        with pytest.raises(type(error)):
            await Membership(fleet, INFO, WorkerLoad).run()

    scenario()


@virtual_time
async def test_leaving_renews_until_forgotten_and_never_registers_again() -> None:
    fleet = Fleet()
    async with member_of(fleet) as membership:
        await asyncio.sleep(1)
        await membership.leave()
        await asyncio.sleep(2 * TTL_S)
        assert [what for what, _ in fleet.calls] == ["register", "leave"] + ["renew"] * 6
        fleet.known = False  # its link has ended
        await asyncio.sleep(2 * TTL_S)
    assert [what for what, _ in fleet.calls[8:]] == ["renew"]


@virtual_time
async def test_leaving_never_fails() -> None:
    fleet = Fleet()
    membership = Membership(fleet, INFO, WorkerLoad)
    await membership.leave()
    fleet.fail = PeerGone("away")
    await membership.leave()
    assert [what for what, _ in fleet.calls] == ["leave", "leave"]
