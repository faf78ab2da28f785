"""grpc cancels a stream's coroutine when the client goes, at any moment: nothing of it may stay."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from baton.errors import PeerGone
from baton.rpc.grpc_server import _serve
from baton.rpc.grpc_stream import Codec
from baton.rpc.services import Duplex
from tests.virtual_time import virtual_time

CODEC: Codec[bytes, bytes] = Codec(lambda value: value, lambda message: message)


class Context:
    """What `_serve` uses of grpc's. The client sends `messages`, then it is silent."""

    def __init__(self, messages: int, ends: bool) -> None:
        self._left = messages
        self._ends = ends

    async def send_initial_metadata(self, _metadata: Any) -> None:
        await asyncio.sleep(0)

    def peer(self) -> str:
        return "ipv4:192.0.2.1:9"

    async def read(self) -> Any:
        await asyncio.sleep(0)
        if self._left:
            self._left -= 1
            return b"message"
        if self._ends:
            return grpc.aio.EOF
        return await asyncio.get_running_loop().create_future()

    async def write(self, _message: Any) -> None:
        await asyncio.sleep(0)


class Service:
    """Answers two messages and returns, or stays until the stream ends; cleans up for a while."""

    def __init__(self, stays: bool) -> None:
        self.clean = True
        self._stays = stays

    async def pair(self, stream: Duplex[bytes, bytes]) -> None:
        self.clean = False
        try:
            for _ in range(1000 if self._stays else 2):
                await stream.send(await stream.receive())
        except PeerGone:
            pass
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            self.clean = True


@virtual_time
@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("ends", [False, True])
async def test_a_cancellation_at_any_turn_of_the_loop_leaves_nothing(
    stays: bool, ends: bool
) -> None:
    for turns in range(40):
        service = Service(stays)
        context: Any = Context(2, ends)
        stream = asyncio.create_task(_serve(context, CODEC, service.pair))
        for _ in range(turns):
            await asyncio.sleep(0)
        stream.cancel()
        await asyncio.wait({stream})
        assert service.clean, turns
        assert asyncio.all_tasks() == {asyncio.current_task()}, turns
