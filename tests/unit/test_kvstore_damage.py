"""Whatever happens to the files, wrong bytes are never returned."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.disk_tier import DiskTier
from kvstore.format import ALIGN
from tests.unit.kvstore_kit import (
    BLOCK,
    chain_of,
    disk_options,
    make_disk,
    opened,
    payload_of,
    read_block,
    write_blocks,
)
from tests.virtual_time import run_virtual

RECORDS, KEYS = 3, chain_of(1, 8)
STRIDE = ALIGN + BLOCK

damages = st.lists(
    st.tuples(
        st.integers(0, 2),  # which segment
        st.one_of(st.floats(0, 1), st.integers(0, RECORDS).map(lambda n: -n)),  # anywhere | headers
        st.integers(0, 200),
        st.integers(1, 5000),
        st.sampled_from(["flip", "zero", "truncate", "duplicate", "random", "remove"]),
    ),
    min_size=1,
    max_size=5,
)


def damage(path: Path, where: float, offset: int, length: int, how: str) -> None:
    if not path.exists():
        return
    data = bytearray(path.read_bytes())
    if not data:
        return
    start = int(where * (len(data) - 1)) if where > 0 else ALIGN - int(where) * STRIDE - STRIDE
    start = min(max(0, start + (offset if where <= 0 else 0)), len(data) - 1)
    end = min(len(data), start + length)
    match how:
        case "flip":
            data[start] ^= 1 << (length % 8)
        case "zero":
            data[start:end] = bytes(end - start)
        case "random":
            data[start:end] = bytes((n * 131 + length) & 255 for n in range(end - start))
        case "truncate":
            del data[start:]
        case "duplicate":  # a record, whole, in the place of another
            data[ALIGN + STRIDE : ALIGN + 2 * STRIDE] = data[ALIGN : ALIGN + STRIDE]
        case "remove":
            path.unlink()
            return
    path.write_bytes(data)


@given(damages=damages, while_open=st.booleans())
@settings(max_examples=400, deadline=None)
def test_blocks_that_are_returned_are_right(
    damages: list[tuple[int, float, int, int, str]], while_open: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        run_virtual(play(directory, damages, while_open))


async def play(
    directory: Path, damages: list[tuple[int, float, int, int, str]], while_open: bool
) -> None:
    def spoil() -> list[int]:
        paths = sorted(directory.glob("segment-*"))
        for which, where, offset, length, how in damages:
            damage(paths[which], where, offset, length, how)
        return [which for which, *_ in damages]

    options = disk_options(directory, RECORDS, segments=8)
    async with opened(make_disk(options)) as disk:
        for key in KEYS:
            await write_blocks(disk, [key])
        if while_open:
            spoil()
            await check(disk)
    if not while_open:
        spoil()
    async with opened(make_disk(options)) as disk:
        right = await check(disk)
        whole = set(range(3)) - {which for which, *_ in damages}
        for which in whole:  # nobody touched these files
            assert right >= set(KEYS[which * RECORDS : (which + 1) * RECORDS])
        await write_blocks(disk, KEYS)  # it goes on, and stores them again
        assert await check(disk) == set(KEYS)


async def check(disk: DiskTier) -> set[bytes]:
    right = set()
    for found, key in zip(
        await asyncio.gather(*(read_block(disk, k) for k in KEYS)), KEYS, strict=True
    ):
        if found is not None:
            assert found == payload_of(key)
            right.add(key)
    assert set(disk) == right  # what did not verify is not claimed any more
    disk.check_integrity()
    return right
