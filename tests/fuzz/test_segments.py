"""Segment files that were damaged, or whose index lies: no wrong bytes, no crash, and it goes on.

The damages and what is checked are those of `tests/unit/test_kvstore_damage.py`; here they also
meet the index at the end of a segment, and indexes that are whole and untrue.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from kvstore.disk_tier import DiskTier
from kvstore.format import ALIGN, fingerprint
from kvstore.segment import number_of
from kvstore.segment_index import IndexCodec
from tests.fuzz.campaign import Campaign, ErrorLog
from tests.unit.kvstore_kit import (
    BLOCK,
    LAYOUT,
    chain_of,
    disk_options,
    make_disk,
    opened,
    payload_of,
    read_block,
    write_blocks,
)
from tests.unit.test_kvstore_damage import KEYS, RECORDS, damage, damages, play
from tests.virtual_time import run_virtual

MORE = chain_of(100, 3)  # never written
INDEX = 2 * ALIGN  # bytes: entries and trailer

positions = st.integers(0, 2 * RECORDS) | st.sampled_from([2**31, 2**32 - 1])
entries = st.lists(st.tuples(positions, st.sampled_from([*KEYS, *MORE])), max_size=6)


@dataclass(frozen=True)
class Lie:
    """An index whose checksums are right. `used` and `number` are None where they are true."""

    segment: int
    keys: list[tuple[int, bytes]]
    used: int | None
    number: int | None
    behind: bool  # the true index, not instead of it


lies = st.builds(
    Lie, st.integers(0, 2), entries, st.none() | positions, st.none() | st.integers(0, 9),
    st.booleans(),
)  # fmt: skip
hits = st.tuples(  # near the end, where the index is
    st.integers(0, 2),
    st.integers(0, INDEX + ALIGN).map(float),
    st.just(0),
    st.integers(1, 5000),
    st.sampled_from(["flip", "zero", "truncate", "random"]),
)


def test_damaged_segments(campaign: Campaign, errors: ErrorLog) -> None:
    def case(drawn: tuple[list[tuple[int, float, int, int, str]], bool]) -> None:
        with tempfile.TemporaryDirectory() as name:
            run_virtual(play(Path(name), *drawn))
        errors.check()

    campaign.run(st.tuples(damages, st.booleans()), case, examples=60)


def test_damaged_and_untrue_indexes(campaign: Campaign, errors: ErrorLog) -> None:
    def case(drawn: tuple[list[Lie], list[tuple[int, float, int, int, str]]]) -> None:
        with tempfile.TemporaryDirectory() as name:
            run_virtual(_play_index(Path(name), *drawn))
        errors.check()

    campaign.run(
        st.tuples(st.lists(lies, max_size=2), st.lists(hits, max_size=3)), case, examples=60
    )


async def _play_index(
    directory: Path, lies: list[Lie], hits: list[tuple[int, float, int, int, str]]
) -> None:
    options = disk_options(directory, RECORDS, segments=8)
    async with opened(make_disk(options)) as disk:
        for key in KEYS:
            await write_blocks(disk, [key])
    _spoil(directory, lies, hits)
    for _ in range(2):  # what the first opening has made of it, too
        async with opened(make_disk(options)) as disk:
            await _check(disk)
            await write_blocks(disk, KEYS)
            assert await _check(disk) >= set(KEYS)


def _spoil(directory: Path, lies: list[Lie], hits: list[tuple[int, float, int, int, str]]) -> None:
    paths = sorted(directory.glob("segment-*"))
    for lie in lies:
        _tell(paths[lie.segment], lie)
    for which, back, offset, length, how in hits:
        size = paths[which].stat().st_size
        damage(paths[which], max(0.0, 1 - back / max(1, size - 1)), offset, length, how)


async def _check(disk: DiskTier) -> set[bytes]:
    """What is returned is right, and what cannot be is not claimed any more."""
    right = set()
    for key in {*KEYS, *MORE}:
        found = await read_block(disk, key)
        if found is not None:
            assert found == payload_of(key)
            right.add(key)
    assert set(disk) == right
    disk.check_integrity()
    return right


def _tell(path: Path, lie: Lie) -> None:
    number = number_of(path.name)
    assert number is not None
    codec = IndexCodec(fingerprint(LAYOUT), number if lie.number is None else lie.number, BLOCK)
    data = path.read_bytes()
    records = data if lie.behind else data[:-INDEX]
    used = RECORDS if lie.used is None else lie.used
    path.write_bytes(records + codec.pack(used, lie.keys))
