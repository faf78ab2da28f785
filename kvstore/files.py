"""File operations of the NVMe tier, where tests let a disk fail, and the threads they run in."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class FileOps(Protocol):
    """All raise OSError. They block: they are called in threads, several at a time."""

    def lock(self, path: Path) -> int:
        """Make the file if need be and take its lock; a descriptor that holds it."""

    def names(self, directory: Path) -> list[str]: ...

    def free_bytes(self, directory: Path) -> int:
        """What this user may still write there."""

    def allows_direct(self, directory: Path) -> bool:
        """Whether files there can be opened with O_DIRECT."""

    def create(self, path: Path, nbytes: int, direct: bool) -> int:
        """A new file with that much space reserved, as zeros; nothing is left of it on failure."""

    def open(self, path: Path, direct: bool) -> int: ...

    def size(self, fd: int) -> int: ...

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Bytes read: fewer than asked for at the file's end only."""

    def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        """All of it, or OSError."""

    def truncate(self, fd: int, nbytes: int) -> None: ...

    def close(self, fd: int) -> None: ...

    def unlink(self, path: Path) -> None: ...


class OsFiles:
    def lock(self, path: Path) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd

    def names(self, directory: Path) -> list[str]:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return sorted(path.name for path in directory.iterdir())

    def free_bytes(self, directory: Path) -> int:
        stat = os.statvfs(directory)
        return stat.f_bavail * stat.f_frsize

    def allows_direct(self, directory: Path) -> bool:
        probe = directory / "direct-io-probe"
        try:
            os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_DIRECT, 0o600))
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        finally:
            probe.unlink(missing_ok=True)
        return True

    def create(self, path: Path, nbytes: int, direct: bool) -> int:
        fd = os.open(path, _flags(direct) | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return fd

    def open(self, path: Path, direct: bool) -> int:
        return os.open(path, _flags(direct))

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        wanted = sum(memoryview(buffer).nbytes for buffer in buffers)
        written = os.pwritev(fd, buffers, offset)
        if written != wanted:  # the disk is full, or a signal came: either way, not stored
            raise OSError(errno.EIO, f"{written} of {wanted} bytes were written")

    def truncate(self, fd: int, nbytes: int) -> None:
        os.ftruncate(fd, nbytes)

    def close(self, fd: int) -> None:
        os.close(fd)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)


class Threads(Protocol):
    """Where blocking calls run."""

    def open(self) -> None: ...

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Returns or raises only when the call has ended, also when cancelled: what it was given
        to write into is then no longer written to."""

    def close(self) -> None:
        """Nothing is running."""


class ThreadPool:
    """A bounded number of threads, from `open` to `close`."""

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._pool: ThreadPoolExecutor | None = None

    def open(self) -> None:
        self._pool = ThreadPoolExecutor(self._count, thread_name_prefix=self._name)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._pool is None:
            raise RuntimeError("threads are used before open or after close")
        job: Future[T] = self._pool.submit(call, *args, **kwargs)
        ended = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            await asyncio.wait([ended])
            if not ended.cancelled():
                ended.exception()  # seen: nobody else will look
            raise

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _flags(direct: bool) -> int:
    return os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
