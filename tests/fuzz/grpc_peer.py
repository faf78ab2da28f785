"""A gRPC peer that sends bytes, and the state of a process that must not grow by it."""

from __future__ import annotations

import asyncio
import gc
import os
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.rpc.grpc_client import CHANNEL_OPTIONS, bearer

ANSWER_S = 30.0  # of real time: whatever was sent, the call has ended by then
TOKEN = "secret"

Made = TypeVar("Made")


class Peer:
    """Of one server. Knows the cluster token unless told otherwise."""

    def __init__(self, address: str, token: str = TOKEN) -> None:
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, options=list(CHANNEL_OPTIONS))
        self._metadata = bearer(token) if token else ()

    async def aclose(self) -> None:
        await self._channel.close()

    async def call(self, method: str, request: bytes) -> grpc.StatusCode:
        """Send one message and read every answer. How it ended."""
        call = self._channel.unary_stream(method)(
            request, metadata=self._metadata, timeout=ANSWER_S
        )
        return await self._drain(call)

    async def stream(self, method: str, messages: Sequence[bytes]) -> grpc.StatusCode:
        """Send all, end our side, and read until the server ends its own."""
        call = self._channel.stream_stream(method)(metadata=self._metadata, timeout=ANSWER_S)
        reading = asyncio.ensure_future(self._drain(call))
        try:
            for message in messages:
                await call.write(message)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the server has ended it already
        return await reading

    async def _drain(self, call: grpc.aio.Call) -> grpc.StatusCode:
        try:
            while await call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError:
            pass
        except asyncio.CancelledError:
            call.cancel()  # grpc does so only while it waits for the server
            raise
        code = await call.code()
        assert code is not grpc.StatusCode.DEADLINE_EXCEEDED, "the call hung"
        return code

    async def check_health(self) -> None:
        stub = health_pb2_grpc.HealthStub(self._channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_S)
        assert answer.status != health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Host(Generic[Made]):
    """Keeps what `context` makes on a loop that runs while `run` does."""

    def __init__(self, context: AbstractAsyncContextManager[Made]) -> None:
        self._context = context
        self._runner = asyncio.Runner()
        self._stop = asyncio.Event()

    def __enter__(self) -> Host[Made]:
        self._runner.__enter__()
        self._runner.run(self._open())
        return self

    def __exit__(self, *why: Any) -> None:
        self._stop.set()
        try:
            self._runner.run(self._close())
        finally:
            self._runner.__exit__(*why)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        self._runner.run(work)

    async def _open(self) -> None:
        ready: asyncio.Future[Made] = asyncio.get_running_loop().create_future()
        self._holding = asyncio.create_task(self._hold(ready), name="host")
        await asyncio.wait({ready, self._holding}, return_when=asyncio.FIRST_COMPLETED)
        if self._holding.done():
            await self._holding
        self.made = ready.result()

    async def _hold(self, ready: asyncio.Future[Made]) -> None:
        """What is entered in a task must be left in it."""
        async with self._context as made:
            ready.set_result(made)
            await self._stop.wait()

    async def _close(self) -> None:
        async with asyncio.timeout(ANSWER_S):
            await self._holding


class Growth:
    """Of this process: tasks, open files, memory. Compared with how it was after the first cases,
    when everything that is made once is there."""

    WARM_UP = 30  # cases
    FILES = 20
    TASKS = 30  # streams between workers that stay, and what gRPC has for each
    MEMORY = 200 << 20  # bytes; Python and gRPC keep what they have had

    def __init__(self) -> None:
        self._cases = 0
        self._before: tuple[int, int, int] | None = None

    def check(self) -> None:
        """After each case, when nothing is under way."""
        self._cases += 1
        if self._cases % self.WARM_UP:
            return
        gc.collect()
        now = (len(asyncio.all_tasks()), len(list(Path("/proc/self/fd").iterdir())), _resident())
        self._before = self._before or now
        limits = (self.TASKS, self.FILES, self.MEMORY)
        for name, was, is_now, more in zip(
            ("tasks", "open files", "bytes of memory"), self._before, now, limits, strict=True
        ):
            assert is_now <= was + more, f"{name} grew from {was} to {is_now}: {_task_names()}"


def _task_names() -> dict[str, int]:
    """Without what differs between tasks of one kind."""
    return dict(
        Counter(
            re.sub(r"[-/ ][^ ]*\d.*", "", t.get_name()) + " " + t.get_coro().__qualname__
            for t in asyncio.all_tasks()
        )
    )


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


async def until(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    """In real time. `what` describes how it is when it does not come."""
    try:
        async with asyncio.timeout(ANSWER_S):
            while not condition():  # noqa: ASYNC110 (plain conditions have no event)
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"still not so after {ANSWER_S} s: {what()}") from None
