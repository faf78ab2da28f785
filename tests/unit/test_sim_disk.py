"""The modelled disk loses exactly what a real one may lose."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from kvstore.format import ALIGN
from sim.disk import FULL_S, WRITEBACK_S, DiskPlan, DiskThreads, ModelledDisk
from sim.log import EventLog
from tests.virtual_time import VirtualTimeLoop, virtual_time

PLAN = DiskPlan(slots=8, records=2, segments=2, call_s=1.0, error_limit=3)
PATH = Path("disk/a")
PAGE = b"x" * ALIGN


class Setting:
    def __init__(self, plan: DiskPlan = PLAN, seed: int = 0) -> None:
        self.now = 0.0
        self.calm = False
        self.log = EventLog(lambda: self.now)
        self.disk = ModelledDisk(
            plan, "s0", Random(seed), lambda: self.now, lambda: self.calm, self.log
        )


def written(pages: int, seed: int = 0, plan: DiskPlan = PLAN) -> tuple[Setting, int]:
    s = Setting(plan, seed)
    fd = s.disk.create(PATH, pages * ALIGN, False)
    s.disk.write(fd, [PAGE] * pages, 0)
    return s, fd


def content(disk: ModelledDisk, fd: int, nbytes: int) -> bytes:
    into = memoryview(bytearray(nbytes))
    return bytes(into[: disk.read(fd, [into], 0)])


def test_what_is_written_is_read() -> None:
    s, fd = written(3)
    assert content(s.disk, fd, 4 * ALIGN) == PAGE * 3
    s.disk.write(fd, [b"yy", b"z"], ALIGN)
    assert content(s.disk, fd, 2 * ALIGN)[ALIGN - 1 :][:5] == b"xyyzx"
    assert s.disk.names(PATH.parent) == ["a"]
    s.disk.unlink(PATH)
    assert s.disk.names(PATH.parent) == []
    assert content(s.disk, fd, ALIGN) == PAGE  # as long as somebody has it open


def test_a_killed_process_leaves_what_it_had_written() -> None:
    s, _ = written(64)
    assert not s.disk.crash()
    assert content(s.disk, s.disk.open(PATH, False), 64 * ALIGN) == PAGE * 64


def test_what_was_being_written_when_it_was_killed_is_there_in_part() -> None:
    s, fd = written(64)
    with s.disk.calling():
        s.disk.write(fd, [b"y" * ALIGN] * 64, 0)
        s.disk.crash()
    found = content(s.disk, s.disk.open(PATH, False), 64 * ALIGN)
    pages = {found[at : at + ALIGN] for at in range(0, len(found), ALIGN)}
    assert pages == {PAGE, b"y" * ALIGN}


def test_with_the_power_goes_what_was_written_lately() -> None:
    s, fd = written(64, plan=replace(PLAN, power_rate=1.0))
    s.now = WRITEBACK_S + 1.0
    s.disk.write(fd, [b"y" * ALIGN] * 32, 0)
    assert s.disk.crash()
    found = content(s.disk, s.disk.open(PATH, False), 64 * ALIGN)
    pages = [found[at : at + ALIGN] for at in range(0, len(found), ALIGN)]
    assert set(pages[:32]) == {PAGE, b"y" * ALIGN}
    assert set(pages[32:]) == {PAGE}


def test_a_failed_write_is_done_in_part() -> None:
    s, fd = written(16)
    s.disk.plan = replace(PLAN, error_rate=1.0)
    with pytest.raises(OSError, match="fails to write"):
        s.disk.write(fd, [b"y" * ALIGN] * 16, 0)
    s.calm = True
    assert content(s.disk, fd, 16 * ALIGN).count(b"y") < 16 * ALIGN
    assert "kvstore.disk_health" in s.log.excused


def test_a_full_disk_has_room_again_later() -> None:
    s = Setting(replace(PLAN, full_rate=1.0))
    with pytest.raises(OSError, match="full") as caught:
        s.disk.create(PATH, ALIGN, False)
    assert caught.value.errno == errno.ENOSPC
    s.calm = True
    s.now = FULL_S + 0.1
    s.disk.create(PATH, ALIGN, False)


def test_a_bit_that_rots_stays_wrong() -> None:
    s, fd = written(1, plan=replace(PLAN, rot_rate=1.0))
    found = content(s.disk, fd, ALIGN)
    assert sum(one != two for one, two in zip(found, PAGE, strict=True)) == 1
    s.calm = True
    assert content(s.disk, fd, ALIGN) == found


def test_a_closed_file_is_not_used() -> None:
    s, fd = written(1)
    s.disk.close(fd)
    with pytest.raises(OSError, match="closed"):
        s.disk.size(fd)
    assert s.log.violations


def test_one_process_has_the_directory_until_it_ends() -> None:
    s = Setting()
    fd = s.disk.lock(PATH)
    with pytest.raises(BlockingIOError):
        s.disk.lock(PATH)
    assert s.disk.check_closed()
    s.disk.close(fd)
    assert not s.disk.check_closed()
    s.disk.lock(PATH)
    s.disk.crash()
    s.disk.lock(PATH)


@virtual_time
async def test_a_call_takes_time_and_is_not_stopped_by_a_cancellation() -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    threads = DiskThreads(Setting().disk, lambda: 1.0)
    called: list[float] = []
    call: Callable[[], None] = lambda: called.append(loop.time())  # noqa: E731
    await threads.run(call)
    assert 0 < called[0] < loop.time() <= 1.5 * PLAN.call_s
    running = asyncio.create_task(threads.run(call))
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    assert len(called) == 2
