"""Transfers that share links: who gets how much, and when they end."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.costs.links import SharedLinks
from sim.loop import OWNER, Clock, SimLoop
from sim.process import Process
from tests.virtual_time import run_virtual, virtual_time


def now() -> float:
    return asyncio.get_running_loop().time()


@virtual_time
async def test_transfer_alone_gets_its_slowest_link() -> None:
    links = SharedLinks({"a": 100.0, "b": 10.0})
    await links.transfer(["a", "b"], 50)
    assert now() == pytest.approx(5.0)
    assert links.moved("a") == links.moved("b") == 50


@virtual_time
async def test_nothing_to_move_takes_no_time() -> None:
    links = SharedLinks({"a": 1.0})
    await links.transfer([], 100)
    await links.transfer(["a"], 0)
    assert now() == 0.0


def test_link_without_bandwidth_or_twice_is_refused() -> None:
    links = SharedLinks({"a": 1.0})
    with pytest.raises(ValueError, match="a is there"):
        links.add("a", 1.0)
    with pytest.raises(ValueError, match="no bandwidth"):
        links.add("b", 0.0)


@virtual_time
async def test_two_share_and_the_one_that_stays_speeds_up() -> None:
    links = SharedLinks({"a": 10.0})
    ends: dict[str, float] = {}

    async def move(name: str, nbytes: float) -> None:
        await links.transfer(["a"], nbytes)
        ends[name] = now()

    async with asyncio.TaskGroup() as group:
        group.create_task(move("short", 10))
        group.create_task(move("long", 30))
    assert ends == {"short": pytest.approx(2.0), "long": pytest.approx(4.0)}


@virtual_time
async def test_what_is_left_on_a_link_goes_to_those_that_can_use_it() -> None:
    """Two cross the narrow link and get 1 each; the third has the rest of the wide one."""
    links = SharedLinks({"wide": 10.0, "narrow": 2.0})
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(links.transfer(["wide", "narrow"], 1000))
        third = group.create_task(links.transfer(["wide"], 80))
        await third
        assert now() == pytest.approx(10.0)


@virtual_time
async def test_cancelled_transfer_leaves_its_share_and_what_it_moved() -> None:
    links = SharedLinks({"a": 10.0})
    stopped = asyncio.create_task(links.transfer(["a"], 100))
    other = asyncio.create_task(links.transfer(["a"], 100))
    await asyncio.sleep(4.0)
    stopped.cancel()
    await asyncio.wait([stopped])
    assert stopped.cancelled()
    await other
    assert now() == pytest.approx(12.0)  # 20 bytes in the first 4 s, 80 in the next 8 s
    assert links.moved("a") == pytest.approx(120)
    assert links.running("a") == 0


@virtual_time
async def test_bytes_are_known_while_they_move() -> None:
    links = SharedLinks({"a": 10.0})
    task = asyncio.create_task(links.transfer(["a"], 100))
    await asyncio.sleep(3.0)
    assert links.moved("a") == pytest.approx(30)
    await task
    assert links.moved("a") == 100


def test_a_process_with_a_wrong_clock_waits_as_long_as_others() -> None:
    loop = SimLoop()

    async def main() -> None:
        links = SharedLinks({"a": 10.0})
        process = Process("p", "1", Clock(offset=500.0, rate=1.001))
        await process.spawn(links.transfer(["a"], 50), "transfer")
        assert OWNER.get() is None
        assert loop.now == pytest.approx(5.0)

    loop.run_until_complete(main())
    loop.close()


@dataclass(frozen=True)
class Move:
    at: float
    path: tuple[int, ...]
    nbytes: float
    cancel_at: float

    def seconds_left(self, moved: float, rate: float) -> float:
        return (self.nbytes - moved) / rate


@dataclass(frozen=True)
class Outcome:
    ends: dict[int, float]  # when each was over, in whatever way
    moved: list[float]  # bytes over each link


MOVES = st.lists(
    st.builds(
        Move,
        at=st.floats(0, 5),
        path=st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True).map(tuple),
        nbytes=st.floats(0.1, 50),
        cancel_at=st.just(math.inf) | st.floats(5, 20),
    ),
    min_size=1,
    max_size=12,
)
CAPACITIES = st.lists(st.floats(0.5, 20), min_size=5, max_size=5)


def max_min(capacities: list[float], paths: dict[int, tuple[int, ...]]) -> dict[int, float]:
    """Rates by the definition: raise all together, and stop those that reach a full link."""
    rates = dict.fromkeys(paths, 0.0)
    growing = set(paths)
    while growing:
        users = [sum(link in paths[one] for one in growing) for link in range(len(capacities))]
        spare = [
            (capacity - sum(rates[one] for one in paths if link in paths[one])) / users[link]
            if users[link]
            else math.inf
            for link, capacity in enumerate(capacities)
        ]
        for one in growing:
            rates[one] += min(spare)
        full = {link for link, each in enumerate(spare) if each <= min(spare) + 1e-12}
        growing = {one for one in growing if not full & set(paths[one])}
    return rates


def fluid(capacities: list[float], moves: list[Move]) -> Outcome:
    """What must happen, from event to event."""
    now, ends, over = 0.0, dict[int, float](), [0.0] * len(capacities)
    moved = dict.fromkeys(range(len(moves)), 0.0)
    while len(ends) < len(moves):
        live = [n for n, move in enumerate(moves) if move.at <= now and n not in ends]
        rates = max_min(capacities, {n: moves[n].path for n in live})
        events = [move.at for move in moves if move.at > now]
        events += [moves[n].cancel_at for n in live]
        events += [now + moves[n].seconds_left(moved[n], rates[n]) for n in live]
        step, now = min(events) - now, min(events)
        for n in live:
            moved[n] += rates[n] * step
            for link in moves[n].path:
                over[link] += rates[n] * step
            if moved[n] >= moves[n].nbytes * (1 - 1e-9) or moves[n].cancel_at <= now:
                ends[n] = now
    return Outcome(ends, over)


@settings(max_examples=50, deadline=None)
@given(CAPACITIES, MOVES)
def test_transfers_share_as_a_fluid_would(capacities: list[float], moves: list[Move]) -> None:
    """Who ends when, and what has moved, also when some are cancelled: that leaves no room for an
    unfair share, for an idle link, for one above its capacity or for bytes that get lost."""
    found, expected = run_virtual(run(capacities, moves)), fluid(capacities, moves)
    assert found.ends == pytest.approx(expected.ends, abs=1e-6)
    assert found.moved == pytest.approx(expected.moved, abs=1e-5)


async def run(capacities: list[float], moves: list[Move]) -> Outcome:
    links = SharedLinks({str(number): rate for number, rate in enumerate(capacities)})
    ends: dict[int, float] = {}

    async def one(number: int, move: Move) -> None:
        await asyncio.sleep(move.at)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(move.cancel_at):
                await links.transfer([str(link) for link in move.path], move.nbytes)
        ends[number] = now()

    async with asyncio.TaskGroup() as group:
        for number, move in enumerate(moves):
            group.create_task(one(number, move))
    names = [str(number) for number in range(len(capacities))]
    assert not any(links.running(name) for name in names)
    return Outcome(ends, [links.moved(name) for name in names])
