"""Segments that end with an index: opening reads it and no records, and never relies on it."""

from __future__ import annotations

import asyncio
import errno
import shutil
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.format import ALIGN, fingerprint
from kvstore.segment import number_of
from kvstore.segment_index import IndexCodec, parse_entries
from tests.unit.kvstore_kit import (
    BLOCK,
    LAYOUT,
    FaultyFiles,
    chain_of,
    disk_options,
    key_of,
    make_disk,
    opened,
    payload_of,
    read_block,
    write_blocks,
)
from tests.virtual_time import run_virtual, virtual_time

KEYS = chain_of(0, 10)
RECORDS = 4  # of a segment: two are full, the last is half full
INDEX = 2 * ALIGN  # bytes: entries and trailer


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("segment-*"))


async def fill(directory: Path) -> None:
    async with opened(make_disk(disk_options(directory, RECORDS, segments=8))) as disk:
        for key in KEYS:
            assert await write_blocks(disk, [key]) == [True]


async def reads_to_open(directory: Path) -> int:
    """And everything is found."""
    files = FaultyFiles()
    async with opened(make_disk(disk_options(directory, RECORDS, segments=8), files)) as disk:
        count = sum(name == "read" for name, _ in files.log)
        disk.check_integrity()
        assert set(disk) == set(KEYS)
        for key in KEYS:
            assert await read_block(disk, key) == payload_of(key)
    return count


@virtual_time
async def test_opening_reads_header_trailer_and_entries_of_each_segment(tmp_path: Path) -> None:
    await fill(tmp_path)
    assert len(segments(tmp_path)) == 3
    assert await reads_to_open(tmp_path) == 3 * 3


@virtual_time
async def test_a_segment_is_sealed_when_it_is_full(tmp_path: Path) -> None:
    """What a process that is killed leaves: its last segment only has to be scanned."""
    options = disk_options(tmp_path / "one", RECORDS, segments=8)
    async with opened(make_disk(options)) as disk:
        for key in KEYS:
            await write_blocks(disk, [key])
        shutil.copytree(tmp_path / "one", tmp_path / "two")
    scanned = 2 + RECORDS  # header, what might be a trailer, every place for a record
    assert await reads_to_open(tmp_path / "two") == 2 * 3 + scanned
    assert await reads_to_open(tmp_path / "two") == 3 * 3  # now it has an index too


@virtual_time
async def test_segments_of_before_there_were_indexes_are_scanned_once(tmp_path: Path) -> None:
    await fill(tmp_path)
    for path in segments(tmp_path):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - INDEX)
    assert await reads_to_open(tmp_path) > 3 * 3
    assert await reads_to_open(tmp_path) == 3 * 3


@virtual_time
async def test_a_removed_block_is_not_in_the_index(tmp_path: Path) -> None:
    options = disk_options(tmp_path, RECORDS, segments=8)
    async with opened(make_disk(options)) as disk:
        await write_blocks(disk, KEYS[:3])
        disk.remove(KEYS[1])
    async with opened(make_disk(options)) as disk:
        assert set(disk) == {KEYS[0], KEYS[2]}


@virtual_time
async def test_a_disk_without_room_for_the_index_keeps_its_blocks(tmp_path: Path) -> None:
    class NoRoomForIndexes(FaultyFiles):
        def truncate(self, fd: int, nbytes: int) -> None:
            raise OSError(errno.ENOSPC, "injected")

    options = disk_options(tmp_path, RECORDS, segments=8)
    async with opened(make_disk(options, NoRoomForIndexes())) as disk:
        assert await write_blocks(disk, KEYS[:RECORDS]) == [True] * RECORDS
        assert disk.stats.pauses == 1
        for key in KEYS[:RECORDS]:
            assert await read_block(disk, key) == payload_of(key)


@given(where=st.integers(0, INDEX - 1), length=st.integers(1, 5000), segment=st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_without_a_whole_index_the_records_are_read(where: int, length: int, segment: int) -> None:
    async def play(directory: Path) -> None:
        await fill(directory)
        path = segments(directory)[segment]
        data = bytearray(path.read_bytes())
        start = len(data) - INDEX + where
        for at in range(start, min(len(data), start + length)):
            data[at] ^= 0x5A
        path.write_bytes(data)
        await reads_to_open(directory)

    with tempfile.TemporaryDirectory() as name:
        run_virtual(play(Path(name)))


@virtual_time
async def test_an_index_that_is_wrong_leads_to_no_wrong_block(tmp_path: Path) -> None:
    """Written by somebody who got it wrong: every sum is right, the keys are not."""
    await fill(tmp_path)
    options = disk_options(tmp_path, RECORDS, segments=8)
    path = segments(tmp_path)[0]
    layout = make_disk(options).format.fingerprint
    lies = IndexCodec(layout, 1, BLOCK).pack(RECORDS, [(0, KEYS[1]), (1, key_of(77))])
    data = path.read_bytes()
    path.write_bytes(data[:-INDEX] + lies)
    async with opened(make_disk(options)) as disk:
        assert set(disk) == {KEYS[1], key_of(77), *KEYS[RECORDS:]}
        found = await asyncio.gather(read_block(disk, KEYS[1]), read_block(disk, key_of(77)))
        assert found == [None, None]
        assert set(disk) == set(KEYS[RECORDS:])
        disk.check_integrity()


def test_an_index_belongs_to_one_segment() -> None:
    keys = tuple((n, key_of(n)) for n in (0, 2, 3))
    codec = IndexCodec(b"l" * 16, 7, BLOCK)
    data = codec.pack(5, keys)
    entries, page = memoryview(data)[:-ALIGN], data[-ALIGN:]
    trailer = codec.parse_trailer(page)
    assert trailer is not None
    assert trailer.used == 5
    assert parse_entries(entries, trailer) == keys
    for other in (
        IndexCodec(b"m" * 16, 7, BLOCK),
        IndexCodec(b"l" * 16, 8, BLOCK),
        IndexCodec(b"l" * 16, 7, 2 * BLOCK),
    ):
        assert other.parse_trailer(page) is None


@virtual_time
async def test_an_index_with_impossible_positions_is_not_believed(tmp_path: Path) -> None:
    """Found by fuzzing: a position beyond the segment was taken for one of the next segment."""
    options = disk_options(tmp_path, RECORDS, segments=8)
    layout = fingerprint(LAYOUT)
    impossible = (
        [(RECORDS, key_of(77))],
        [(0, KEYS[0]), (0, KEYS[1])],
        [(1, KEYS[1]), (0, KEYS[0])],
    )
    for keys in impossible:
        await fill(tmp_path)
        path = segments(tmp_path)[0]
        lies = IndexCodec(layout, number_of(path.name) or 0, BLOCK).pack(RECORDS, keys)
        path.write_bytes(path.read_bytes()[:-INDEX] + lies)
        async with opened(make_disk(options)) as disk:
            disk.check_integrity()
            for key in KEYS:
                assert await read_block(disk, key) == payload_of(key)
        for path in segments(tmp_path):
            path.unlink()
