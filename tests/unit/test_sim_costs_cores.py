"""Cores that jobs share, in virtual time."""

import asyncio

import pytest

from sim.costs.cores import Cores, Kind
from sim.loop import SimLoop

ALONE: dict[tuple[Kind, Kind], float] = {}


def ends(jobs, cores=2, beside=ALONE):
    """When each of (start, core, kind, seconds) is done."""
    loop = SimLoop()
    shared = Cores(cores, beside)
    found = {}

    async def one(number, start, core, kind, seconds):
        await asyncio.sleep(start)
        await shared.work([core], kind, seconds)
        found[number] = loop.time()

    async def all_of_them():
        await asyncio.gather(*(one(number, *job) for number, job in enumerate(jobs)))

    try:
        loop.run_until_complete(all_of_them())
    finally:
        loop.close()
    return [found[number] for number in range(len(jobs))]


def test_a_job_alone_takes_its_time():
    assert ends([(1.0, 0, Kind.PREFILL, 2.0)]) == pytest.approx([3.0])


def test_jobs_of_a_core_share_it_and_others_have_theirs():
    jobs = [(0.0, 0, Kind.PREFILL, 3.0), (1.0, 0, Kind.DECODE, 1.0), (0.0, 1, Kind.PREFILL, 3.0)]
    assert ends(jobs) == pytest.approx([4.0, 3.0, 3.0])


def test_jobs_beside_each_other_are_slower_as_long_as_they_are():
    beside = {(Kind.PREFILL, Kind.DECODE): 1.5, (Kind.DECODE, Kind.PREFILL): 2.0}
    jobs = [(0.0, 0, Kind.PREFILL, 3.0), (0.0, 1, Kind.DECODE, 1.0)]
    # The decode takes 2 s. Meanwhile 2 / 1.5 of the prefill are done.
    assert ends(jobs, beside=beside) == pytest.approx([2.0 + 3.0 - 2 / 1.5, 2.0])


def test_several_jobs_beside_slow_as_their_mean_and_several_cores_as_their_sum():
    beside = {(Kind.PREFILL, Kind.DECODE): 1.5, (Kind.PREFILL, Kind.PREFILL): 2.0}
    others = [(0.0, 1, Kind.DECODE, 9.0), (0.0, 1, Kind.PREFILL, 9.0), (0.0, 2, Kind.DECODE, 9.0)]
    [end, *_] = ends([(0.0, 0, Kind.PREFILL, 1.0), *others], 3, beside)
    assert end == pytest.approx(1 + (0.5 + 1.0) / 2 + 0.5)


def test_work_goes_to_the_core_with_least_to_do():
    loop = SimLoop()
    shared = Cores(2, ALONE)

    async def both():
        busy = asyncio.create_task(shared.work([0], Kind.PREFILL, 5.0))
        await asyncio.sleep(1.0)
        await shared.work([0, 1], Kind.FRONT, 1.0)
        now = loop.time()
        await busy
        await shared.work([0], Kind.FRONT, 0.0)  # takes no time
        return now, loop.time()

    try:
        assert loop.run_until_complete(both()) == pytest.approx((2.0, 5.0))
    finally:
        loop.close()
