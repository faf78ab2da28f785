"""How fast a directory's disk writes and reads in a row, past the page cache where it can be."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from baton.errors import ConfigError

CHUNK = 4 << 20  # bytes; a multiple of what O_DIRECT wants
MOST = 512 << 20  # bytes
SECONDS = 1.0  # for each direction


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Bytes per second. Not `direct`: through the page cache, reads say little."""

    write: float
    read: float
    direct: bool


def measure(directory: str) -> DiskSpeed:
    """Takes about 2 s and 512 MiB at most, which are removed. Raises ConfigError when the directory
    cannot be written."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".baton-doctor-") as file:
            return _measure(Path(file.name))
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror}") from error


def _measure(path: Path) -> DiskSpeed:
    flag, direct = os.O_DIRECT, True
    try:
        descriptor = os.open(path, os.O_RDWR | flag)
    except OSError:  # tmpfs and some network file systems do not have it
        descriptor, direct = os.open(path, os.O_RDWR), False
    buffer = mmap.mmap(-1, CHUNK)  # aligned to a page
    buffer[:] = os.urandom(CHUNK)  # some disks compress
    try:
        written, seconds = _repeat(lambda at: os.pwritev(descriptor, [buffer], at), MOST)
        begin = time.perf_counter()
        os.fsync(descriptor)
        seconds += time.perf_counter() - begin
        if not direct:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        read, read_seconds = _repeat(lambda at: os.preadv(descriptor, [buffer], at), written)
    finally:
        os.close(descriptor)
        buffer.close()
    return DiskSpeed(written / seconds, read / read_seconds, direct)


def _repeat(move: Callable[[int], int], most: int) -> tuple[int, float]:
    """(bytes, seconds) of chunks in a row until one of both is used up."""
    begin = time.perf_counter()
    done = 0
    while done < most and time.perf_counter() - begin < SECONDS:
        done += move(done)
    return done, time.perf_counter() - begin
