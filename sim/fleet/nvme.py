"""A node's NVMe without bytes: files in memory for the production tier, and the time of its calls.

Records have their headers and payloads of one slot (`SLOT`), which take the time of whole blocks on
the way to or from the drives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from baton.types.fleet import KvLayout
from kvstore.disk_options import DiskOptions
from kvstore.disk_tier import DiskTier
from kvstore.format import ALIGN, padded
from kvstore.journal import TierChanges
from kvstore.segment_index import entries_bytes

T = TypeVar("T")
P = ParamSpec("P")

SLOT = KvLayout("slot", "bfloat16", num_layers=1, kv_heads=1, head_dim=1, block_size=1)
SLOT_BYTES = SLOT.block_bytes
_SEGMENT_BLOCKS = 16  # blocks of large models are larger than what fills a segment of a real store
_FREE_BYTES = 1 << 50

Carry = Callable[[int, int], Awaitable[None]]
"""Returns when so many blocks were read from the drives, and so many written to them."""


def make_disk(blocks: int, changes: TierChanges, carry: Carry) -> DiskTier:
    """A tier that has room for at least `blocks`."""
    stride = ALIGN + padded(SLOT_BYTES)
    file_bytes = ALIGN + _SEGMENT_BLOCKS * stride + entries_bytes(_SEGMENT_BLOCKS) + ALIGN
    options = DiskOptions(
        Path("nvme"),
        max_bytes=-(-blocks // _SEGMENT_BLOCKS) * file_bytes,
        segment_bytes=ALIGN + _SEGMENT_BLOCKS * stride,
        floor_bytes=0,
        batch_bytes=stride,
        direct=False,
    )
    files = SparseFiles()
    return DiskTier(options, SLOT, changes, files, NvmeThreads(files, options.threads, carry))


@dataclass(slots=True)
class _File:
    nbytes: int
    written: dict[int, bytes] = field(default_factory=dict)  # by offset, without zeros at the end


class SparseFiles:
    """Implements `kvstore.files.FileOps`. What was written is read at the same offsets only."""

    def __init__(self) -> None:
        self.read_blocks = 0
        self.written_blocks = 0
        self._files: dict[str, _File] = {}
        self._open: dict[int, _File] = {}
        self._next_fd = 3

    def lock(self, path: Path) -> int:
        return self._opened(_File(0))

    def names(self, directory: Path) -> list[str]:
        return sorted(self._files)

    def free_bytes(self, directory: Path) -> int:
        return _FREE_BYTES

    def allows_direct(self, directory: Path) -> bool:
        return False

    def create(self, path: Path, nbytes: int, direct: bool) -> int:
        self._files[path.name] = _File(nbytes)
        return self.open(path, direct)

    def open(self, path: Path, direct: bool) -> int:
        return self._opened(self._files[path.name])

    def size(self, fd: int) -> int:
        return self._open[fd].nbytes

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        file, at = self._open[fd], offset
        for buffer in buffers:
            buffer[:] = file.written.get(at, b"").ljust(buffer.nbytes, b"\0")
            at += buffer.nbytes
            self.read_blocks += buffer.nbytes == SLOT_BYTES
        return at - offset

    def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        file = self._open[fd]
        for buffer in buffers:
            data = bytes(buffer)
            file.written[offset] = data.rstrip(b"\0")
            offset += len(data)
            self.written_blocks += len(data) == SLOT_BYTES
        file.nbytes = max(file.nbytes, offset)

    def truncate(self, fd: int, nbytes: int) -> None:
        self._open[fd].nbytes = nbytes

    def close(self, fd: int) -> None:
        del self._open[fd]

    def unlink(self, path: Path) -> None:
        self._files.pop(path.name, None)

    def _opened(self, file: _File) -> int:
        fd = self._next_fd
        self._next_fd += 1
        self._open[fd] = file
        return fd


class NvmeThreads:
    """Implements `kvstore.files.Threads`: a call happens at once, and ends when its blocks have
    moved."""

    def __init__(self, files: SparseFiles, count: int, carry: Carry) -> None:
        self._files = files
        self._free = asyncio.Semaphore(count)
        self._carry = carry

    def open(self) -> None:
        """There is no thread to start."""

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        files = self._files
        async with self._free:
            read, written = files.read_blocks, files.written_blocks
            result = call(*args, **kwargs)
            await self._carry(files.read_blocks - read, files.written_blocks - written)
            return result

    def close(self) -> None:
        """There is no thread to end."""
