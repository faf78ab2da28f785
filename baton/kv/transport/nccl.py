"""Transport over torch.distributed point to point: NCCL between GPUs, gloo between CPUs.

Both only know matched sends and receives, so a pull is asked for on a side channel:

    reader                                     source (asyncio TCP server, since start)
    cookie ---------------------------------->  known? "ok"
    "open" ---------------------------------->  makes the rendezvous, answers its port
    both join a two-rank process group, each in the pair's own thread
    [[offset, length], ...] ----------------->  checks, answers "ok", sends the spans in order
    receives them in the same order

One request moves at most SLICE bytes, so that an abort is prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from baton.errors import InternalError, TransportError
from baton.kv.transport.base import Copy, PoolMemory
from baton.kv.transport.memory import make_pool
from baton.kv.transport.nccl_group import (
    READER,
    SOURCE,
    TIMEOUT_S,
    PairGroup,
    Span,
    join_store,
    make_store,
    pool_tensor,
)
from baton.kv.transport.transfer import (
    PendingTransfer,
    check_copies,
    refused_endpoint,
    unknown_peer,
)

SLICE = 4 << 20  # bytes per request
SPANS = 4096  # copies per request
LINE = 1 << 20  # bytes of the longest request: SPANS pairs of numbers
CONNECT_S = 10.0


class NcclTransport:
    name = "nccl"

    def __init__(self, worker: str, host: str) -> None:
        self._worker = worker
        self._host = host
        self._cookie = secrets.token_hex(32)
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._memory: PoolMemory | None = None
        self._pool: torch.Tensor | None = None
        self._links: dict[str, _Link] = {}

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, self._host, 0, limit=LINE)

    def allocate(self, nbytes: int, device: str = "cpu", backing: Path | None = None) -> PoolMemory:
        if self._memory is not None:
            raise InternalError("a transport has one pool, and this one has it already")
        self._memory = make_pool(nbytes, device, backing)
        self._pool = pool_tensor(self._memory.buffer, self._memory.device)
        return self._memory

    def endpoint(self) -> bytes:
        if self._server is None:
            raise InternalError("start the transport before asking for its endpoint")
        memory = self._own_memory()
        port = self._server.sockets[0].getsockname()[1]
        kind = memory.device.partition(":")[0]
        return json.dumps([self._host, port, self._cookie, memory.nbytes, kind]).encode()

    async def connect(self, peer: str, endpoint: bytes) -> None:
        kind = self._own_memory().device.partition(":")[0]
        await self.disconnect(peer)
        writer: asyncio.StreamWriter | None = None
        try:
            host, port, cookie, nbytes, their_kind = json.loads(endpoint)
            if kind != their_kind:
                raise ValueError(f"its pool is on {their_kind} and ours on {kind}")
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection(host, port)
                link = _Link(peer, reader, writer, host, int(nbytes), self._pool_tensor())
                await link.say(cookie)
        except (OSError, ValueError, TypeError, TransportError) as error:  # OSError: also timeouts
            raise refused_endpoint(peer, self.name, error) from error
        else:
            link.start()
            self._links[peer] = link
        finally:
            if writer is not None and peer not in self._links:
                writer.close()

    async def disconnect(self, peer: str) -> None:
        link = self._links.pop(peer, None)
        if link is not None:
            await link.close()

    def read(self, peer: str, copies: Sequence[Copy]) -> PendingTransfer:
        link = self._links.get(peer)
        if link is None:
            raise unknown_peer(peer)
        check_copies(copies, self._own_memory().nbytes, link.nbytes, peer)
        return link.read(tuple(copies))

    @contextmanager
    def serving(self, peer: str) -> Iterator[None]:
        yield  # the side channel serves from start to close

    async def close(self) -> None:
        for peer in list(self._links):
            await self.disconnect(peer)
        if self._server is not None:
            self._server.close()
            for task in self._serving:
                task.cancel()
            if self._serving:
                await asyncio.wait(self._serving)
            await self._server.wait_closed()
            self._server = None
        self._memory = self._pool = None

    def _own_memory(self) -> PoolMemory:
        if self._memory is None:
            raise InternalError("allocate the pool first")
        return self._memory

    def _pool_tensor(self) -> torch.Tensor:
        if self._pool is None:
            raise InternalError("allocate the pool first")
        return self._pool

    # -- the source's side ---------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            raise InternalError("connections are served by tasks")
        self._serving.add(task)
        executor = ThreadPoolExecutor(1, thread_name_prefix=f"nccl source {self._worker}")
        try:
            async with asyncio.timeout(CONNECT_S):
                cookie = json.loads(await reader.readline())
            if secrets.compare_digest(str(cookie), self._cookie):
                await _answer(writer, "ok")
                await self._serve(reader, writer, executor)
        except (OSError, ValueError, RuntimeError, asyncio.CancelledError):
            pass  # the reader learns of it by the connection's end
        finally:
            self._serving.discard(task)
            writer.close()
            executor.shutdown(wait=False)  # a send that still blocks ends with its timeout

    async def _serve(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        executor: ThreadPoolExecutor,
    ) -> None:
        loop = asyncio.get_running_loop()
        group: PairGroup | None = None
        while line := await reader.readline():
            request = json.loads(line)
            if request == "open":
                store = await loop.run_in_executor(executor, make_store, self._host)
                await _answer(writer, store.port)
                group = await loop.run_in_executor(
                    executor, PairGroup, store, SOURCE, self._host, self._pool_tensor()
                )
                continue
            spans = [(int(offset), int(length)) for offset, length in request]
            end = self._own_memory().nbytes
            if group is None or any(o < 0 or n <= 0 or o + n > end for o, n in spans):
                await _answer(writer, "refused")
                return
            await _answer(writer, "ok")
            await loop.run_in_executor(executor, group.send, spans)


class _Link:
    """The reader's side of one pair: transfers one after the other, in the order of `read`."""

    def __init__(
        self,
        peer: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        host: str,
        nbytes: int,
        pool: torch.Tensor,
    ) -> None:
        self.nbytes = nbytes
        self._peer = peer
        self._reader = reader
        self._writer = writer
        self._host = host
        self._pool = pool
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"nccl reader of {peer}")
        self._queue: asyncio.Queue[tuple[PendingTransfer, tuple[Copy, ...]] | None] = (
            asyncio.Queue()
        )
        self._group: PairGroup | None = None
        self._error: TransportError | None = None
        self._current: PendingTransfer | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"nccl reads from {self._peer}")

    def read(self, copies: tuple[Copy, ...]) -> PendingTransfer:
        transfer = PendingTransfer(self._peer)
        self._queue.put_nowait((transfer, copies))
        return transfer

    async def say(self, request: object) -> Any:
        """One request on the side channel; its answer. Raises OSError or TransportError."""
        async with asyncio.timeout(TIMEOUT_S):
            await _answer(self._writer, request)
            line = await self._reader.readline()
        answer = json.loads(line) if line else "gone"
        if answer in ("gone", "refused"):
            raise TransportError(f"the source answered: {answer}")
        return answer

    async def close(self) -> None:
        """Fail what is left; return when nothing is written into the pool any more."""
        self._fail("it was disconnected")
        if self._current is not None:
            self._current.stop()
        self._queue.put_nowait(None)
        if self._task is not None:
            await asyncio.wait([self._task])
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        self._executor.shutdown(wait=False)  # idle: the task has ended

    async def _run(self) -> None:
        while (entry := await self._queue.get()) is not None:
            transfer, copies = entry
            self._current = transfer
            if self._error is None:
                try:
                    await self._move(transfer, copies)
                except Exception as error:  # torch raises several kinds
                    self._fail(error)
            if self._error is None and transfer.stopped:
                transfer.end(TransportError(f"the read from {self._peer} was aborted"))
            else:
                transfer.end(self._error)
            self._current = None

    async def _move(self, transfer: PendingTransfer, copies: tuple[Copy, ...]) -> None:
        loop = asyncio.get_running_loop()
        if self._group is None:
            port = int(await self.say("open"))
            store = await loop.run_in_executor(self._executor, join_store, self._host, port)
            self._group = await loop.run_in_executor(
                self._executor, PairGroup, store, READER, self._host, self._pool
            )
        for remote, local in _requests(copies):
            if transfer.stopped or self._error is not None:
                return
            await self.say(remote)
            await loop.run_in_executor(self._executor, self._group.receive, local)

    def _fail(self, why: object) -> None:
        if self._error is None:  # the order of messages is lost: the link cannot be used again
            self._error = TransportError(f"read from {self._peer} failed: {why}")


async def _answer(writer: asyncio.StreamWriter, message: object) -> None:
    writer.write(json.dumps(message).encode() + b"\n")
    await writer.drain()


def _requests(copies: Sequence[Copy]) -> Iterator[tuple[list[Span], list[Span]]]:
    """(remote spans, local spans) of at most SLICE bytes and SPANS spans each."""
    remote: list[Span] = []
    local: list[Span] = []
    room = SLICE
    for copy in copies:
        done = 0
        while done < copy.length:
            size = min(room, copy.length - done)
            remote.append((copy.remote + done, size))
            local.append((copy.local + done, size))
            done, room = done + size, room - size
            if not room or len(remote) == SPANS:
                yield remote, local
                remote, local, room = [], [], SLICE
    if remote:
        yield remote, local
