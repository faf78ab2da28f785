"""The NVMe tier: what it keeps, what it gives up, and how it lives with a disk that fails."""

from __future__ import annotations

import asyncio
import errno
import mmap
from dataclasses import replace
from pathlib import Path

import pytest

from baton.errors import ConfigError, LayoutMismatch
from kvstore.disk_options import DiskState
from kvstore.files import ThreadPool
from kvstore.format import ALIGN, NO_PARENT, BlockInfo, checksum
from tests.unit.kvstore_kit import (
    BLOCK,
    BROKEN,
    FULL,
    LAYOUT,
    FaultyFiles,
    InlineThreads,
    chain_of,
    disk_options,
    info_of,
    key_of,
    make_disk,
    opened,
    payload_of,
    read_block,
    write_blocks,
)
from tests.virtual_time import settle, virtual_time

A, B, C, D = chain_of(1, 4)


def files_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("segment-*"))


@virtual_time
async def test_blocks_come_back_as_they_were(tmp_path: Path) -> None:
    async with opened(make_disk(disk_options(tmp_path))) as disk:
        assert await write_blocks(disk, [A, B]) == [True, True]
        assert await read_block(disk, A) == payload_of(A)
        assert await read_block(disk, B) == payload_of(B)
        assert await read_block(disk, C) is None
        assert set(disk) == {A, B}
        disk.check_integrity()


@virtual_time
async def test_what_is_queued_is_written_in_one_call(tmp_path: Path) -> None:
    files = FaultyFiles()
    options = disk_options(tmp_path, records=64)
    async with opened(make_disk(options, files, InlineThreads(0.01))) as disk:
        await write_blocks(disk, chain_of(1, 40))
        writes = [nbytes for name, nbytes in files.log if name == "write"]
        assert sum(writes) == ALIGN + 40 * (ALIGN + BLOCK)
        assert len(writes) <= 4


@virtual_time
async def test_a_restart_finds_everything(tmp_path: Path) -> None:
    options = disk_options(tmp_path)
    keys = chain_of(1, 10)
    async with opened(make_disk(options)) as disk:
        await write_blocks(disk, keys)
    for _ in range(2):
        async with opened(make_disk(options)) as disk:
            disk.check_integrity()
            assert set(disk) == set(keys)
            for key in keys:
                assert await read_block(disk, key) == payload_of(key)


@virtual_time
async def test_what_was_not_written_is_cut_off(tmp_path: Path) -> None:
    options = disk_options(tmp_path)
    async with opened(make_disk(options)) as disk:
        await write_blocks(disk, [A])
    async with opened(make_disk(options)):
        index = 2 * ALIGN
        assert files_in(tmp_path)[0].stat().st_size == ALIGN + ALIGN + BLOCK + index


@virtual_time
async def test_the_oldest_segment_makes_room(tmp_path: Path) -> None:
    options = disk_options(tmp_path, records=2, segments=3)
    async with opened(make_disk(options)) as disk:
        for key in chain_of(1, 6):
            await write_blocks(disk, [key])
        await read_block(disk, key_of(1))  # its segment is in use
        await write_blocks(disk, [key_of(7)])
        assert set(disk) == {key_of(n) for n in (1, 2, 5, 6, 7)}
        assert len(files_in(tmp_path)) == 3
        assert disk.stats.given_up == 2
        disk.check_integrity()


@virtual_time
async def test_a_sparse_segment_is_moved_to_the_new_one(tmp_path: Path) -> None:
    async with opened(make_disk(disk_options(tmp_path, records=4, segments=8))) as disk:
        await write_blocks(disk, chain_of(1, 8))
        for n in (1, 3, 4):
            assert disk.remove(key_of(n))
        await write_blocks(disk, [key_of(9)])
        assert disk.stats.moved == 1
        assert set(disk) == {key_of(n) for n in (2, 5, 6, 7, 8, 9)}
        assert len(files_in(tmp_path)) == 2
        assert await read_block(disk, key_of(2)) == payload_of(key_of(2))
        disk.check_integrity()
    async with opened(make_disk(disk_options(tmp_path, records=4, segments=8))) as disk:
        assert set(disk) == {key_of(n) for n in (2, 5, 6, 7, 8, 9)}


@virtual_time
async def test_a_block_that_cannot_be_moved_is_forgotten(tmp_path: Path) -> None:
    files = FaultyFiles()
    async with opened(make_disk(disk_options(tmp_path, records=4, segments=8), files)) as disk:
        await write_blocks(disk, chain_of(1, 8))
        for n in (3, 4):
            disk.remove(key_of(n))
        files.fail["read"] = (errno.EIO, 1)
        await write_blocks(disk, [key_of(9)])
        assert set(disk) == {key_of(n) for n in (2, 5, 6, 7, 8, 9)}
        assert len(files_in(tmp_path)) == 2
        disk.check_integrity()


@virtual_time
async def test_small_segments_of_many_restarts_become_one(tmp_path: Path) -> None:
    options = disk_options(tmp_path, records=8, segments=6)
    for n in range(1, 20):
        async with opened(make_disk(options)) as disk:
            await write_blocks(disk, [key_of(n)])
            disk.check_integrity()
    assert len(files_in(tmp_path)) <= 6
    async with opened(make_disk(options)) as disk:
        assert len(disk) == 19
        assert disk.stats.damaged == 0


@virtual_time
async def test_a_read_survives_its_segment(tmp_path: Path) -> None:
    options = disk_options(tmp_path, records=1, segments=2)
    async with opened(make_disk(options, threads=InlineThreads(1.0))) as disk:
        await write_blocks(disk, [A])
        reading = asyncio.create_task(read_block(disk, A))
        await settle()
        disk._threads = InlineThreads()
        await write_blocks(disk, [B])
        await write_blocks(disk, [C])
        assert A not in disk
        assert await reading == payload_of(A)
        disk.check_integrity()


@virtual_time
async def test_a_damaged_block_is_forgotten(tmp_path: Path) -> None:
    async with opened(make_disk(disk_options(tmp_path))) as disk:
        await write_blocks(disk, [A, B])
        with files_in(tmp_path)[0].open("r+b") as file:
            file.seek(ALIGN + ALIGN + 100)
            file.write(b"!")
        assert await read_block(disk, A) is None
        assert A not in disk
        assert disk.stats.damaged == 1
        assert await read_block(disk, B) == payload_of(B)
        disk.check_integrity()


@virtual_time
async def test_a_full_disk_pauses_writing_and_nothing_else(tmp_path: Path) -> None:
    files = FaultyFiles()
    options = replace(disk_options(tmp_path, records=1), pause_s=60)
    async with opened(make_disk(options, files)) as disk:
        await write_blocks(disk, [A])
        files.fail["create"] = FULL
        assert await write_blocks(disk, [B]) == [False]
        assert disk.state is DiskState.PAUSED
        assert await read_block(disk, A) == payload_of(A)
        files.fail.clear()
        assert await write_blocks(disk, [C]) == [False]
        await asyncio.sleep(61)
        assert await write_blocks(disk, [C]) == [True]
        assert disk.state is DiskState.ON
        assert disk.stats.pauses == 1
        disk.check_integrity()


@virtual_time
async def test_the_floor_of_free_space_is_kept(tmp_path: Path) -> None:
    files = FaultyFiles(free=1 << 40)
    options = replace(disk_options(tmp_path, records=1), floor_bytes=1 << 30)
    async with opened(make_disk(options, files)) as disk:
        await write_blocks(disk, [A])
        files.free = 1 << 29
        assert await write_blocks(disk, [B]) == [False]
        assert disk.state is DiskState.PAUSED
        assert files_in(tmp_path) == []  # it gave back what it had


@virtual_time
@pytest.mark.parametrize("what", ["read", "write"])
async def test_a_failing_disk_turns_the_tier_off(tmp_path: Path, what: str) -> None:
    files = FaultyFiles()
    async with opened(make_disk(disk_options(tmp_path), files)) as disk:
        await write_blocks(disk, [A])
        files.fail[what] = BROKEN
        for n in range(3):
            assert disk.state is DiskState.ON
            if what == "read":
                assert await read_block(disk, A) is None
            else:
                assert await write_blocks(disk, [key_of(10 + n)]) == [False]
        assert disk.state is DiskState.OFF
        assert disk.stats.errors == 3
        assert len(disk) == 0
        assert await read_block(disk, A) is None
        assert await write_blocks(disk, [B]) == [False]
        disk.check_integrity()
    async with opened(make_disk(disk_options(tmp_path))) as disk:  # the disk was replaced
        assert await read_block(disk, A) == payload_of(A)


@virtual_time
async def test_a_disk_that_cannot_be_opened_leaves_the_tier_off(tmp_path: Path) -> None:
    files = FaultyFiles(fail={"names": (errno.EACCES, 1)})
    async with opened(make_disk(disk_options(tmp_path), files)) as disk:
        assert disk.state is DiskState.OFF
        assert await write_blocks(disk, [A]) == [False]


@virtual_time
async def test_a_file_that_cannot_be_deleted_does_not_keep_the_tier_from_opening(
    tmp_path: Path,
) -> None:
    """Found by the fault harness, seed 1090: files that had been opened stayed so, too."""
    options = disk_options(tmp_path, records=2)
    async with opened(make_disk(options)) as disk:
        await write_blocks(disk, chain_of(1, 4))
    files_in(tmp_path)[0].write_bytes(bytes(ALIGN))
    files = FaultyFiles(fail={"unlink": BROKEN})
    async with opened(make_disk(options, files)) as disk:
        assert disk.state is DiskState.ON
        assert await read_block(disk, key_of(4)) == payload_of(key_of(4))
        assert await write_blocks(disk, chain_of(5, 2)) == [True, True]


@virtual_time
async def test_an_unforeseen_failure_turns_the_tier_off(tmp_path: Path) -> None:
    disk = make_disk(disk_options(tmp_path))
    async with opened(disk):
        assert await disk.write(info_of(A), None) is False  # type: ignore[arg-type]
        assert disk.state is DiskState.OFF
        assert await write_blocks(disk, [B]) == [False]


@virtual_time
async def test_two_stores_cannot_share_a_directory(tmp_path: Path) -> None:
    async with opened(make_disk(disk_options(tmp_path))):
        with pytest.raises(ConfigError, match="in use by another store"):
            await make_disk(disk_options(tmp_path)).open()
    async with opened(make_disk(disk_options(tmp_path))):
        pass


@virtual_time
async def test_another_layout_is_an_error_that_names_both(tmp_path: Path) -> None:
    async with opened(make_disk(disk_options(tmp_path))) as disk:
        await write_blocks(disk, [A])
    other = replace(LAYOUT, model="f" * 64)
    with pytest.raises(LayoutMismatch, match=r"model=mmm.*model=fff"):
        await make_disk(disk_options(tmp_path), layout=other).open()
    async with opened(make_disk(disk_options(tmp_path))) as disk:
        assert set(disk) == {A}


@virtual_time
async def test_cancelled_writes_and_reads_end_first(tmp_path: Path) -> None:
    async with opened(make_disk(disk_options(tmp_path), threads=InlineThreads(1.0))) as disk:
        writing = asyncio.create_task(disk.write(info_of(A), memoryview(payload_of(A))))
        await asyncio.sleep(0.5)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert A in disk
        reading = asyncio.create_task(read_block(disk, A))
        await asyncio.sleep(0.5)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        disk.check_integrity()


@virtual_time
async def test_closing_refuses_what_is_queued(tmp_path: Path) -> None:
    disk = make_disk(disk_options(tmp_path), threads=InlineThreads(1.0))
    await disk.open()
    writes = [
        asyncio.create_task(disk.write(info_of(key), memoryview(payload_of(key))))
        for key in chain_of(1, 20)
    ]
    await asyncio.sleep(0.1)
    await disk.close()
    assert not all(await asyncio.gather(*writes))
    await disk.close()


async def test_real_threads_and_direct_io(tmp_path: Path) -> None:
    layout = replace(LAYOUT, num_layers=16)  # 64 KiB
    options = replace(disk_options(tmp_path), segment_bytes=1 << 20, max_bytes=4 << 20, direct=True)
    keys = chain_of(1, 40)
    area = memoryview(mmap.mmap(-1, layout.block_bytes))  # aligned
    for _ in range(2):
        disk = make_disk(options, threads=ThreadPool(2, "test"), layout=layout)
        async with opened(disk):
            for key in keys:
                area[:] = payload_of(key, layout.block_bytes)
                assert await disk.write(BlockInfo(key, 0, NO_PARENT, checksum(area)), area)
            for key in keys:
                assert None not in await disk.read_many([(key, area)])
                assert bytes(area) == payload_of(key, layout.block_bytes)
            disk.check_integrity()
