"""Transfers that share links: who gets how much, and when they end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.costs.links import SharedLinks
from sim.loop import OWNER, Clock, SimLoop
from sim.process import Process
from tests.virtual_time import run_virtual, settle, virtual_time


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
    cancel_at: float | None


MOVES = st.lists(
    st.builds(
        Move,
        st.floats(0, 5),
        st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True).map(tuple),
        st.floats(0.1, 50),
        st.none() | st.floats(0, 8),
    ),
    min_size=1,
    max_size=12,
)
CAPACITIES = st.lists(st.floats(0.5, 20), min_size=5, max_size=5)


@settings(max_examples=50, deadline=None)
@given(CAPACITIES, MOVES)
def test_shares_are_fair_full_and_conserve_bytes(
    capacities: list[float], moves: list[Move]
) -> None:
    run_virtual(_check(capacities, moves))


async def _check(capacities: list[float], moves: list[Move]) -> None:
    links = SharedLinks({str(number): rate for number, rate in enumerate(capacities)})
    live: dict[int, Move] = {}
    whole = dict.fromkeys(map(str, range(5)), 0.0)  # bytes of transfers that ran to their end
    parts = dict(whole)  # an upper bound for those that were cancelled

    async def one(number: int, move: Move) -> None:
        await asyncio.sleep(move.at)
        live[number] = move
        path = [str(link) for link in move.path]
        bytes_to, ended = parts, False
        try:
            async with asyncio.timeout_at(move.cancel_at):
                await links.transfer(path, move.nbytes)
            bytes_to, ended = whole, True
        except TimeoutError:
            pass
        finally:
            del live[number]
            for link in path:
                bytes_to[link] += move.nbytes
        assert ended or move.cancel_at is not None

    async def watch() -> None:
        while True:
            await settle(5)
            await _check_rates(links, capacities, list(live.values()))
            await asyncio.sleep(0.37)

    watching = asyncio.create_task(watch())
    async with asyncio.TaskGroup() as group:
        for number, move in enumerate(moves):
            group.create_task(one(number, move))
    watching.cancel()
    await asyncio.wait([watching])
    assert watching.cancelled() or watching.exception() is None, watching.exception()
    for name in whole:
        assert links.running(name) == 0
        assert whole[name] - 1e-6 <= links.moved(name) <= whole[name] + parts[name] + 1e-6


async def _check_rates(links: SharedLinks, capacities: list[float], live: list[Move]) -> None:
    """Over an instant without a change: no link above its capacity; each transfer crosses a link
    that is full, on which nobody has more than it (that is what max-min fair means)."""
    step = 1e-4
    before = [links.moved(str(number)) for number in range(5)]
    flows = links.rates()
    await asyncio.sleep(step)
    if links.rates() != flows:
        return  # something began or ended
    used = [(links.moved(str(number)) - before[number]) / step for number in range(5)]
    for rate, capacity in zip(used, capacities, strict=True):
        assert rate <= capacity * (1 + 1e-6)
    assert len(flows) == len(live)
    for path, rate in flows:
        assert any(
            used[int(link)] >= capacities[int(link)] * (1 - 1e-6)
            and all(other <= rate * (1 + 1e-6) for crossed, other in flows if link in crossed)
            for link in path
        )
