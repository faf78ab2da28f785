"""Pool memory: anonymous and committed on the CPU, a torch tensor on CUDA devices."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from baton.errors import ConfigError
from baton.kv.transport.base import PoolMemory

Bytes = npt.NDArray[np.uint8]

_COPY_BYTES = 64 << 20
"""Of CUDA memory that `host_runs` gathers at a time."""

_MADV_POPULATE_WRITE = 23  # Linux 5.14; missing from the mmap module

_CHUNK_BYTES = 64 << 20
_SLOW_BYTES_PER_S = 1 << 30
"""Below this the kernel makes huge pages by moving others, at a tenth of the usual rate: a pool
of gigabytes would keep a worker from starting for half a minute."""


def commit(area: mmap.mmap) -> None:
    """Take the pages now, so that a pool too large fails at start and no read pays for faults."""
    for start in range(0, len(area), _CHUNK_BYTES):
        length = min(_CHUNK_BYTES, len(area) - start)
        began = time.monotonic()
        try:
            area.madvise(_MADV_POPULATE_WRITE, start, length)
        except OSError:
            part = np.frombuffer(area, dtype=np.uint8, count=length, offset=start)
            part[:: mmap.PAGESIZE] |= 0  # older kernels
        if length > (time.monotonic() - began) * _SLOW_BYTES_PER_S:
            continue
        with contextlib.suppress(OSError, AttributeError, ValueError):
            area.madvise(mmap.MADV_NOHUGEPAGE, start + length)  # what is left, if anything


def cpu_pool(nbytes: int) -> PoolMemory:
    """Zeroed private memory. It lives as long as something refers to `buffer`.

    In huge pages where the kernel has them: reads over CMA were 1.35 times as fast.
    """
    area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        area.madvise(mmap.MADV_HUGEPAGE)
    commit(area)
    return pool_of(np.frombuffer(area, dtype=np.uint8))


def open_backing(path: Path, nbytes: int) -> int:
    """The file, of that size and locked against other processes. Raises ConfigError."""
    fd = -1
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, nbytes)
        os.posix_fallocate(fd, 0, nbytes)  # or a write to a full file system would be a signal
    except BlockingIOError:
        os.close(fd)
        raise ConfigError(f"{path} is in use by another process") from None
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise ConfigError(f"{path} cannot be used for {nbytes} bytes: {error.strerror}") from error
    return fd


def backed_pool(nbytes: int, backing: Path) -> PoolMemory:
    """Shared memory in a file, locked as long as something refers to `buffer`. ConfigError."""
    fd = open_backing(backing, nbytes)
    try:
        area = mmap.mmap(fd, nbytes)  # has a descriptor of its own, and with it the lock
        commit(area)
    finally:
        os.close(fd)
    return pool_of(np.frombuffer(area, dtype=np.uint8))


def pool_of(array: Bytes) -> PoolMemory:
    return PoolMemory(array.ctypes.data, array.nbytes, "cpu", array)


def cuda_pool(nbytes: int, device: str) -> PoolMemory:
    """Zeroed memory of a CUDA device as a torch uint8 tensor."""
    import torch

    tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    return PoolMemory(tensor.data_ptr(), nbytes, str(tensor.device), tensor)


def make_pool(nbytes: int, device: str, backing: Path | None = None) -> PoolMemory:
    """A pool on `device`. Raises ConfigError for a device that no transport knows, and when
    `backing` cannot be had."""
    if device == "cpu":
        return cpu_pool(nbytes) if backing is None else backed_pool(nbytes, backing)
    if device.startswith("cuda"):
        return cuda_pool(nbytes, device)
    raise ConfigError(f"KV pools can be on cpu or cuda:N, not on {device!r}")


def require_cpu(transport: str, device: str) -> None:
    if device != "cpu":
        raise ConfigError(
            f"transport {transport} serves CPU memory only; for {device} use nixl or nccl"
        )


def host_runs(
    memory: PoolMemory, stride: int, blocks: Sequence[int], first: int, length: int
) -> Iterator[memoryview]:
    """Bytes [first, first + length) of blocks of `stride` bytes, copied from CUDA many at a time.

    The copies are on the current stream of the calling thread. The runner's is another one, so they
    overlap with a step that computes, and wait for nothing.
    """
    import torch

    buffer: Any = memory.buffer
    rows = buffer[: memory.nbytes // stride * stride].view(-1, stride)
    at_once = max(1, _COPY_BYTES // length)
    for begin in range(0, len(blocks), at_once):
        some = torch.tensor(blocks[begin : begin + at_once], device=rows.device)
        for run in rows[some, first : first + length].cpu().numpy():
            yield memoryview(run)
