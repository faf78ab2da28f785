"""Transport between processes of one host: pools in nameless shared memory, plain copies.

    source:  memfd  | header page: cookie | pool ... |
    reader:  opens /proc/<pid>/fd/<fd>, checks the cookie, maps read-only, copies in a thread

A memfd has no name, so a process that is killed leaves nothing behind. The cookie makes sure that
a recycled process id or descriptor is never taken for the peer.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from baton.errors import InternalError, TransportError
from baton.kv.transport.base import Copy, PoolMemory
from baton.kv.transport.memory import Bytes, commit, open_backing, pool_of, require_cpu
from baton.kv.transport.transfer import (
    PendingTransfer,
    check_copies,
    refused_endpoint,
    unknown_peer,
)

HEADER = mmap.PAGESIZE
COOKIE = 32
SLICE = 1 << 20  # bytes between two looks at the stop flag: about 0.2 ms


@dataclass(frozen=True, slots=True)
class ShmEndpoint:
    pid: int
    fd: int
    cookie: str  # hexadecimal
    nbytes: int

    def encode(self) -> bytes:
        return json.dumps([self.pid, self.fd, self.cookie, self.nbytes]).encode()

    @classmethod
    def decode(cls, data: bytes) -> ShmEndpoint:
        pid, fd, cookie, nbytes = json.loads(data)
        return cls(int(pid), int(fd), str(cookie), int(nbytes))


class ShmTransport:
    name = "shm"

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._executor: ThreadPoolExecutor | None = None
        self._fd = -1
        self._cookie = secrets.token_bytes(COOKIE)
        self._pool: Bytes | None = None
        self._peers: dict[str, Bytes] = {}
        self._transfers: set[PendingTransfer] = set()

    async def start(self) -> None:
        threads = max(1, min(4, (os.cpu_count() or 1) // 4))
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"shm {self._worker}")

    def allocate(self, nbytes: int, device: str = "cpu", backing: Path | None = None) -> PoolMemory:
        require_cpu(self.name, device)
        if self._pool is not None:
            raise InternalError("a transport has one pool, and this one has it already")
        if backing is None:
            self._fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self._fd, HEADER + nbytes)
            # A reader's mapping can never be cut short under it.
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        else:
            self._fd = open_backing(backing, HEADER + nbytes)
        area = mmap.mmap(self._fd, HEADER + nbytes)
        commit(area)
        area[:COOKIE] = self._cookie
        self._pool = np.frombuffer(area, dtype=np.uint8)[HEADER:]
        return pool_of(self._pool)

    def endpoint(self) -> bytes:
        if self._pool is None:
            raise InternalError("allocate the pool before asking for its endpoint")
        return ShmEndpoint(os.getpid(), self._fd, self._cookie.hex(), self._pool.nbytes).encode()

    async def connect(self, peer: str, endpoint: bytes) -> None:
        try:
            pool = _map(ShmEndpoint.decode(endpoint))
        except (OSError, ValueError, TypeError) as error:
            raise refused_endpoint(peer, self.name, error) from error
        await self.disconnect(peer)
        self._peers[peer] = pool

    async def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)
        self._fail([t for t in self._transfers if t.peer == peer], f"{peer} was disconnected")

    def read(self, peer: str, copies: Sequence[Copy]) -> PendingTransfer:
        source = self._peers.get(peer)
        if source is None or self._executor is None:
            raise unknown_peer(peer)
        if self._pool is None:
            raise InternalError("allocate the pool before reading into it")
        check_copies(copies, self._pool.nbytes, source.nbytes, peer)
        transfer = PendingTransfer(peer)
        self._transfers.add(transfer)
        loop = asyncio.get_running_loop()
        job = loop.run_in_executor(
            self._executor, _copy_all, transfer, self._pool, source, tuple(copies)
        )
        job.add_done_callback(lambda done: self._finish(transfer, done.exception()))
        return transfer

    @contextmanager
    def serving(self, peer: str) -> Iterator[None]:
        yield  # readers need nothing from this side

    async def close(self) -> None:
        transfers = list(self._transfers)
        self._fail(transfers, "the transport was closed")
        for transfer in transfers:
            await transfer.abort()
        if self._executor is not None:
            self._executor.shutdown()  # idle: every transfer has ended
            self._executor = None
        self._peers.clear()
        self._pool = None  # unmapped when the runner's tensor is gone too
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _fail(self, transfers: list[PendingTransfer], why: str) -> None:
        for transfer in transfers:
            transfer.settle(TransportError(f"read from {transfer.peer} failed: {why}"))
            transfer.stop()

    def _finish(self, transfer: PendingTransfer, error: BaseException | None) -> None:
        self._transfers.discard(transfer)
        transfer.end(
            None if error is None else TransportError(f"read from {transfer.peer} failed: {error}")
        )


def _map(endpoint: ShmEndpoint) -> Bytes:
    """The peer's pool, read-only. Raises OSError or ValueError when it is not the one meant."""
    with Path(f"/proc/{endpoint.pid}/fd/{endpoint.fd}").open("rb", buffering=0) as file:
        size = HEADER + endpoint.nbytes
        if os.fstat(file.fileno()).st_size != size:
            raise ValueError(f"process {endpoint.pid} holds something else there now")
        area = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
    if not secrets.compare_digest(area[:COOKIE].hex(), endpoint.cookie):
        raise ValueError(f"process {endpoint.pid} is not the one that was announced")
    return np.frombuffer(area, dtype=np.uint8)[HEADER:]


def _copy_all(
    transfer: PendingTransfer, local: Bytes, remote: Bytes, copies: tuple[Copy, ...]
) -> None:
    """Runs in a thread. numpy lets go of the interpreter lock while it copies."""
    for copy in copies:
        for start in range(0, copy.length, SLICE):
            if transfer.stopped:
                raise InterruptedError("aborted")
            size = min(SLICE, copy.length - start)
            target, origin = copy.local + start, copy.remote + start
            local[target : target + size] = remote[origin : origin + size]
