"""A real process that is killed while it stores blocks: the next one finds all but the last."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest

import baton
from kvstore.format import checksum
from kvstore.memory_tier import MemoryTier, Put
from kvstore.slot_table import HEADER_BYTES, map_file
from tests.unit.kvstore_kit import (
    BLOCK,
    Areas,
    disk_options,
    info_of,
    key_of,
    make_disk,
    make_memory,
    opened,
    payload_of,
    read_block,
    recover,
)

ROOT = Path(baton.__file__).parents[1]
SLOTS = 4096
BEHIND = 16  # blocks that are not sealed

STORES_IN_MEMORY = """
import sys
from pathlib import Path
from tests.unit.test_kvstore_kill import fill_memory
fill_memory(Path(sys.argv[1]))
"""
STORES_ON_DISK = """
import asyncio, sys
from pathlib import Path
from tests.unit.test_kvstore_kill import fill_disk
asyncio.run(fill_disk(Path(sys.argv[1])))
"""


def mapped(directory: Path) -> MemoryTier:
    payload = map_file(directory / "payload", SLOTS * BLOCK)
    headers = map_file(directory / "headers", SLOTS * HEADER_BYTES)
    return make_memory(Areas(payload, headers))  # type: ignore[arg-type]


def fill_memory(directory: Path) -> None:
    """In the child: say the number of each block once it is sealed, some puts later, as by a thread
    that is behind. Never ends by itself: when memory is full, blocks take the places of others."""
    memory = mapped(directory)
    unsealed: deque[Put] = deque()
    n = 0
    while True:
        key = key_of(n)
        slot = memory.begin(key)
        if slot is None:
            memory.evict(key_of(n - SLOTS))
            continue
        memory.view(slot)[:] = payload_of(key)
        unsealed.append(memory.commit(key))
        n += 1
        if len(unsealed) > BEHIND:
            put = unsealed.popleft()
            memory.seal(put, checksum(memory.view(put.slot)))
            os.write(1, b"%d\n" % (n - 1 - BEHIND))


async def fill_disk(directory: Path) -> None:
    async with opened(make_disk(disk_options(directory, records=64, segments=4096))) as disk:
        n = 0
        while True:
            keys = [key_of(n + i) for i in range(5)]
            payloads = [memoryview(payload_of(key)) for key in keys]
            stored = await asyncio.gather(
                *(disk.write(info_of(k), p) for k, p in zip(keys, payloads, strict=True))
            )
            assert all(stored)
            n += 5
            os.write(1, b"%d\n" % (n - 1))


def killed_after(code: str, directory: Path, number: int) -> int:
    """Run the code until it has said that number, kill it; the last number that it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    said = process.stdout
    assert said is not None
    with said:
        while int(said.readline()) < number:
            pass
        process.send_signal(signal.SIGKILL)
        rest = said.read().split("\n")[:-1]  # a number that was half said does not count
    process.wait()
    return int(rest[-1]) if rest else number


@pytest.mark.parametrize("number", [1, 777, 6000])
def test_memory_survives(tmp_path: Path, number: int) -> None:
    last = killed_after(STORES_IN_MEMORY, tmp_path, number)
    memory = mapped(tmp_path)
    recover(memory)
    memory.check_integrity()
    for key in memory:
        slot = memory.slot_of(key)
        assert slot is not None
        assert bytes(memory.view(slot)) == payload_of(key)
    # Beyond what was said: one that was sealed and not said. Missing: those evicted for the next,
    # which were not sealed yet.
    first = max(0, last + 1 + BEHIND - SLOTS)
    wanted = {key_of(n) for n in range(first, last + 1)}
    assert wanted - set(memory) <= {key_of(first), key_of(first + 1)}
    assert set(memory) - wanted <= {key_of(last + 1)}


@pytest.mark.parametrize("number", [4, 800])
async def test_disk_survives(tmp_path: Path, number: int) -> None:
    last = await asyncio.to_thread(killed_after, STORES_ON_DISK, tmp_path, number)
    async with opened(make_disk(disk_options(tmp_path, records=64, segments=4096))) as disk:
        disk.check_integrity()
        for n in range(last + 1):
            assert await read_block(disk, key_of(n)) == payload_of(key_of(n))
        for key in list(disk):
            assert await read_block(disk, key) == payload_of(key)
