"""Which segments in a directory an NVMe tier goes on with; the others are deleted, or an error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.errors import LayoutMismatch
from kvstore.files import Threads
from kvstore.segment import is_current, segment_name
from kvstore.segment_io import Scanned, SegmentIo

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OldSegment:
    number: int
    path: Path
    fd: int
    keys: tuple[tuple[int, bytes], ...]  # (position, key), not empty


async def find_segments(
    io: SegmentIo, threads: Threads, directory: Path, numbers: Sequence[int], room: int
) -> list[OldSegment]:
    """The newest `room` segments that hold blocks of our layout, oldest first, opened.

    Deletes what is damaged, empty, of another version or beyond `room`; a file that cannot be read
    or deleted stays. Raises LayoutMismatch, and deletes nothing, when another layout's blocks are
    there.
    """
    paths = [directory / segment_name(number) for number in numbers]
    scans = [threads.run(io.scan, path) for path in paths]
    results = await asyncio.gather(*scans, return_exceptions=True)
    opened: list[tuple[int, Path, Scanned]] = []
    for number, path, result in zip(numbers, paths, results, strict=True):
        if isinstance(result, Scanned):
            opened.append((number, path, result))
        elif isinstance(result, OSError):
            log.warning("%s cannot be read and is left alone: %s", path.name, result)
        else:
            raise result
    try:
        for _, path, scan in opened:
            _check_layout(io, path, scan)
    except LayoutMismatch:
        for _, _, scan in opened:
            io.files.close(scan.fd)
        raise
    useful = [(n, path, scan) for n, path, scan in opened if _is_useful(n, path, scan)]
    kept = useful[max(0, len(useful) - room) :]
    kept_numbers = {number for number, _, _ in kept}
    for number, path, scan in opened:
        if number not in kept_numbers:
            io.files.close(scan.fd)
            try:
                await threads.run(io.files.unlink, path)
            except OSError as error:
                log.warning("%s cannot be deleted and is left alone: %s", path.name, error)
    return [OldSegment(n, path, scan.fd, scan.keys) for n, path, scan in kept]


def _check_layout(io: SegmentIo, path: Path, scan: Scanned) -> None:
    header = scan.header
    if header is None or not is_current(header):
        return
    if header.fingerprint != io.format.fingerprint:
        raise LayoutMismatch(
            f"{path.parent} has KV blocks of another layout ({header.layout}) than this store's "
            f"({io.format.layout}); give the store another directory, or empty this one"
        )


def _is_useful(number: int, path: Path, scan: Scanned) -> bool:
    if scan.header is None or scan.header.number != number:
        log.warning("%s has no valid header: it is deleted", path.name)
        return False
    if not is_current(scan.header):
        log.info("%s is of another version: it is deleted", path.name)
        return False
    return bool(scan.keys)
