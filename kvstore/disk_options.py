"""What an NVMe tier can be told, and what it tells about itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class DiskState(StrEnum):
    ON = "on"
    PAUSED = "paused"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """`max_bytes` is rounded down to whole segments, and up to two of them."""

    directory: Path
    max_bytes: int
    segment_bytes: int = 256 << 20
    floor_bytes: int = 1 << 30  # of the file system that stay free
    batch_bytes: int = 8 << 20  # of one write call
    threads: int = 8
    error_limit: int = 16  # failed reads and writes until the tier is turned off
    pause_s: float = 60.0
    direct: bool = True  # O_DIRECT where the file system has it


@dataclass(slots=True)
class DiskStats:
    """Counted since the start. Blocks, except where it says otherwise."""

    written: int = 0
    read: int = 0
    refused: int = 0  # writes: paused, off, or failed
    damaged: int = 0  # did not verify; forgotten
    moved: int = 0  # by compaction
    given_up: int = 0  # with their segment, for room
    errors: int = 0  # calls to the disk that failed
    pauses: int = 0
