"""Whatever order things happen in: what is said to be good is good, and nothing is left behind."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import BatonError
from baton.kv.blocks.offer import Offers
from baton.kv.transport.loopback import Fault
from baton.rpc.memory import Fault as MessageFault
from baton.types.blocks import RenewLoans, Return
from tests.unit.blocks_kit import OPTIONS, TTL, Side, World, keys, world
from tests.virtual_time import run_virtual, settle

STEPS = ("borrow", "borrow", "borrow", "offer", "put", "cancel", "kill", "wait", "expire")


@dataclass
class RandomFaults:
    """Of reads and of messages, one after the other."""

    reads: list[Fault]
    messages: list[MessageFault]
    count: int = field(default=0)

    def on_read(self, reader: str, source: str, nbytes: int) -> Fault:
        self.count += 1
        return self.reads[self.count % len(self.reads)] if self.reads else Fault()

    def on_message(self, sender: str, receiver: str, message: object) -> MessageFault:
        self.count += 1
        if not self.messages:
            return MessageFault()
        fault = self.messages[self.count % len(self.messages)]
        late = isinstance(message, (RenewLoans, Return))
        return fault if late or fault.lose else MessageFault()

    def on_call(self, caller: str, callee: str, method: str) -> MessageFault:
        return MessageFault()


class Play:
    """A store, and two workers that borrow from it and from each other, and offer to it. All of
    them reuse their blocks as soon as no loan holds them."""

    def __init__(self, w: World, store: Side, workers: list[Side], offers: list[Offers]) -> None:
        self.world = w
        self.store = store
        self.workers = workers
        self.offers = offers
        self.borrows: list[asyncio.Task[None]] = []
        self.places = [range(at, at + 3) for at in range(40, 64, 3)]

    async def borrow(self, worker: Side, source: Side, numbers: list[int]) -> None:
        """Afterwards the blocks are somebody else's."""
        place = self.places.pop()
        try:
            await worker.borrow(source, numbers, place, timeout_s=3 * TTL, layer_groups=2)
        finally:
            for block in place:
                worker.pool.block(block)[:] = 0xEE
            await asyncio.sleep(TTL)  # in which nobody writes
            for block in place:
                assert (worker.pool.block(block) == 0xEE).all()
            self.places.append(place)

    async def step(self, name: str, which: int, side: int) -> None:
        worker = self.workers[side]
        numbers = [which, which + 1, which + 2]
        match name:
            case "borrow" if self.places:
                source = self.store if which % 2 else self.workers[1 - side]
                self.borrows.append(asyncio.create_task(self.borrow(worker, source, numbers)))
            case "offer":
                self.offers[side].offer(keys(*numbers), which)
            case "put" if which not in worker.pool.held and not +worker.pool.leases:
                worker.pool.put(*numbers, first_block=which)
            case "cancel" if self.borrows:
                self.borrows[which % len(self.borrows)].cancel()
                await settle(1)
            case "wait":
                await asyncio.sleep(TTL / 3)
            case "expire":
                await asyncio.sleep(2 * TTL)
            case "kill":
                for stream in tuple(self.store.server._streams):
                    await stream.aclose()
        await settle(3)


async def play(steps: list[tuple[str, int, int]], faults: RandomFaults) -> None:
    async with world(faults, faults) as w:
        store = await w.side("s", takes=True)
        workers = [await w.side(f"w{n}") for n in range(2)]
        offers = [w.offers(worker, store.peer) for worker in workers]
        for worker in workers:
            worker.pool.put(*range(8))
            worker.pool.run, worker.pool.pause_s = 2, 1.0
        for side in (store, *workers):
            side.pool.reuse = True
        scene = Play(w, store, workers, offers)
        for name, which, side in steps:
            await scene.step(name, which, side)
        if scene.borrows:
            await asyncio.wait(scene.borrows)
        await asyncio.sleep(2 * (OPTIONS.take_timeout_s + OPTIONS.linger_s) + 5 * TTL)
        for borrow in scene.borrows:
            if not borrow.cancelled() and (error := borrow.exception()) is not None:
                assert isinstance(error, BatonError), error
        for side in (store, *workers):
            side.pool.check_even()


read_faults = st.lists(
    st.builds(
        Fault,
        delay_s=st.sampled_from([0.0, 1.0, 1.5 * TTL]),
        error=st.sampled_from([None, None, None, "link down"]),
        hang=st.sampled_from([False, False, False, True]),
    ),
    max_size=3,
)
message_faults = st.lists(
    st.builds(
        MessageFault,
        delay_s=st.sampled_from([0.0, 2 * TTL]),
        lose=st.sampled_from([False] * 7 + [True]),
    ),
    max_size=20,
)
steps = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 7), st.integers(0, 1)), min_size=2, max_size=30
)


@settings(max_examples=60, deadline=None)
@given(steps, read_faults, message_faults)
def test_nothing_wrong_is_used_and_nothing_is_left(
    steps: list[tuple[str, int, int]],
    read_faults: list[Fault],
    message_faults: list[MessageFault],
) -> None:
    run_virtual(play(steps, RandomFaults(read_faults, message_faults)))
