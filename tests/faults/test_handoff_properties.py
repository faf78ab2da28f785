"""Whatever order things happen in, every attempt ends once and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import BatonError
from baton.kv.handoff.leases import REMEMBERED, Deadlines, Ending, History
from baton.kv.transport.loopback import Fault
from baton.types.request import AttemptId, WireError
from tests.unit.handoff_kit import FIRST, TTL, DecodeSide, PrefillSide, cluster, same
from tests.virtual_time import run_virtual, settle

STEPS = ("expect", "publish", "prefilled", "finish", "fetch", "cancel", "kill", "wait", "expire")
CANCELLED = WireError("cancelled", "the client went away")


@dataclass
class RandomFaults:
    faults: list[Fault]
    count: int = field(default=0)

    def on_read(self, reader: str, source: str, nbytes: int) -> Fault:
        self.count += 1
        return self.faults[self.count % len(self.faults)] if self.faults else Fault()


@dataclass
class Attempt:
    """What the prefill worker's engine would know."""

    id: AttemptId
    block: int
    known: bool = False
    published: int = 0  # layers
    leased: bool = False
    done: bool = False


class World:
    """A prefill worker and two decode workers, driven step by step."""

    def __init__(self, prefill: PrefillSide, decodes: list[DecodeSide]) -> None:
        self.prefill = prefill
        self.decodes = decodes
        self.attempts = [Attempt(AttemptId(f"r{n % 3}", n // 3), n) for n in range(6)]
        self.fetches: list[tuple[AttemptId, int, asyncio.Task[object]]] = []

    async def step(self, name: str, which: int, side: int) -> None:
        attempt = self.attempts[which]
        publisher = self.prefill.publisher
        match name:
            case "expect":
                attempt.known = True
                publisher.expect(attempt.id)
            case "publish" if attempt.published < 4 and not attempt.done:
                attempt.known = True
                begin, attempt.published = attempt.published, attempt.published + 2
                publisher.publish(attempt.id, 0, (attempt.block,), begin, attempt.published)
                attempt.leased |= attempt.id in publisher.live()
            case "prefilled" if attempt.published == 4 and not attempt.done:
                attempt.done = True
                publisher.prefilled(attempt.id, FIRST, 1)
            case "finish":
                attempt.known = attempt.done = True
                publisher.finish_without_handoff(attempt.id, CANCELLED)
            case "fetch":
                decode = self.decodes[side]
                block = len(self.fetches) % 32
                task = asyncio.create_task(
                    decode.fetch(attempt.id, self.prefill.peer, (block,), timeout_s=5 * TTL)
                )
                self.fetches.append((attempt.id, side, task))
            case "cancel" if self.fetches:
                self.fetches[which % len(self.fetches)][2].cancel()
            case "wait":
                await asyncio.sleep(TTL / 3)
            case "expire":
                await asyncio.sleep(3 * TTL)
            case "kill":
                for pair in list(self.decodes[side].reader._pairs.values()):
                    if pair._stream is not None:
                        await pair._stream.aclose()
        await settle(3)


async def play(steps: list[tuple[str, int, int]], faults: list[Fault]) -> None:
    async with cluster(RandomFaults(faults)) as c:
        prefill = await c.prefill()
        decodes = [await c.decode(f"d{n}") for n in range(2)]
        world = World(prefill, decodes)
        for name, which, side in steps:
            await world.step(name, which, side)
            prefill.publisher.check_integrity()
        if world.fetches:
            await asyncio.wait([task for _, _, task in world.fetches])
        await asyncio.sleep(100 * TTL)
        for attempt in world.attempts:
            if attempt.known and not attempt.published:  # its worker gives up in the end
                prefill.publisher.finish_without_handoff(attempt.id, CANCELLED)
        check(world)


def check(world: World) -> None:
    publisher = world.prefill.publisher
    publisher.check_integrity()
    assert publisher.live() == ()
    endings = Counter(attempt for attempt, _ in world.prefill.endings)
    for attempt in world.attempts:
        assert endings[attempt.id] == attempt.known, f"{attempt.id}: {world.prefill.endings}"
        assert world.prefill.released.count(attempt.id) >= attempt.leased
    won = Counter[AttemptId]()
    for attempt_id, _, task in world.fetches:
        if not task.cancelled() and (error := task.exception()) is not None:
            assert isinstance(error, BatonError), error
        elif not task.cancelled():
            won[attempt_id] += 1
    handed = [attempt for attempt, how in world.prefill.endings if how is Ending.RELEASED]
    assert all(won[attempt] <= handed.count(attempt) <= 1 for attempt in won)
    for decode in world.decodes:
        assert Counter(decode.idle) == Counter(decode.quarantined)
        assert not decode.transport._tasks


FAULTS = st.builds(
    Fault,
    delay_s=st.sampled_from([0.0, 0.0, 1.0, 3 * TTL]),
    error=st.sampled_from([None, None, None, "link down"]),
    corrupt=st.sampled_from([False, False, False, True]),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 5), st.integers(0, 1)), max_size=40),
    st.lists(FAULTS, max_size=4),
)
def test_any_interleaving_ends_every_attempt_once(
    steps: list[tuple[str, int, int]], faults: list[Fault]
) -> None:
    run_virtual(play(steps, faults))


def test_the_same_program_takes_the_same_steps() -> None:
    """The virtual clock makes runs repeatable: two runs end at the same time."""

    async def run() -> tuple[float, list[object]]:
        async with cluster(RandomFaults([Fault(delay_s=1.5)])) as c:
            prefill, decode = await c.prefill(), await c.decode()
            for n in range(5):
                prefill.publish(AttemptId(str(n)), (n,))
                prefill.publisher.prefilled(AttemptId(str(n)), FIRST, 1)
            await asyncio.gather(
                *(decode.fetch(AttemptId(str(n)), prefill.peer, (n,)) for n in range(5))
            )
            assert all(same(decode.block(n), prefill.block(n)) for n in range(5))
            return asyncio.get_running_loop().time(), list(prefill.endings)

    assert run_virtual(run()) == run_virtual(run())


def test_history_is_bounded() -> None:
    history = History()
    for n in range(REMEMBERED + 10):
        history.ended(AttemptId(f"r{n}"), Ending.RELEASED, None)
        history.note(AttemptId(f"r{n}"))
    assert history.ending(AttemptId("r0")) is None
    assert history.ending(AttemptId("r10")) == (Ending.RELEASED, None)
    assert history.note(AttemptId("r3")) is None
    assert history.note(AttemptId(f"r{REMEMBERED}", 4)) == 0
    assert history.note(AttemptId(f"r{REMEMBERED}", 2)) == 4


def test_deadlines_come_in_order() -> None:
    deadlines = Deadlines()
    assert deadlines.push(3.0, AttemptId("c"))
    assert deadlines.push(1.0, AttemptId("a", 2))
    assert not deadlines.push(2.0, AttemptId("b"))
    assert deadlines.next() == 1.0
    assert deadlines.pop_due(0.5) is None
    assert deadlines.pop_due(2.5) == AttemptId("a", 2)
    assert deadlines.pop_due(2.5) == AttemptId("b")
    assert deadlines.pop_due(2.5) is None
