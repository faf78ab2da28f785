"""The prefill service: compute prompts, publish their KV, hand over.

StartPrefill -> engine (hand_off) -> KvReady* -> publisher -> decode worker reads
                                 \\-> first token -> conductor
"""

from __future__ import annotations

import asyncio

from baton.engine.events import KvFilled, KvReady, KvWanted
from baton.errors import BatonError, InvalidRequest
from baton.kv.handoff.publisher import HandoffPublisher
from baton.rpc.errors import to_wire
from baton.rpc.grpc_server import RpcServer
from baton.rpc.services import BlocksDialer, Duplex
from baton.types.fleet import WorkerLoad
from baton.types.handoff import DecodeMessage, PrefillMessage
from baton.types.link import StartDecode, StartPrefill
from baton.types.request import AttemptId, AttemptOutput, SampledToken
from baton.worker.links import LinkServer
from baton.worker.parts import WorkerParts
from baton.worker.sharing import Sharing
from prefill_worker.publish import Endings


class PrefillService:
    """Implements Duty, EngineListener and HandoffService."""

    def __init__(self, parts: WorkerParts, blocks: BlocksDialer) -> None:
        self._engine = parts.make_engine(self)
        self.sharing = Sharing(parts, self._engine, blocks)
        self.links = LinkServer(
            self, self.load, self.sharing.news, news_lag=parts.metrics.kv_event_lag
        )
        self._pairs: set[Duplex[PrefillMessage, DecodeMessage]] = set()
        self._endings = Endings(self._engine, self.links.report)
        self._publisher = HandoffPublisher(
            parts.identity,
            parts.shared.view(),
            parts.memory,
            self._endings.release,
            self._endings.on_end,
            parts.handoff,
            parts.metrics.handoff,
        )

    # -- process -------------------------------------------------------------------------------

    def serve_on(self, server: RpcServer) -> None:
        server.add_worker(self.links)
        server.add_handoff(self)
        self.sharing.serve_on(server)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            leases = group.create_task(self._publisher.run(), name="leases")
            sharing = group.create_task(self.sharing.run(), name="sharing")
            await self._engine.run()
            sharing.cancel()
            leases.cancel()

    async def wait_idle(self) -> None:
        await self.links.wait_idle()

    async def aclose(self) -> None:
        await self.links.aclose()
        await asyncio.gather(*(pair.aclose() for pair in tuple(self._pairs)))
        await self.sharing.aclose()
        self._engine.stop()

    def load(self) -> WorkerLoad:
        return self.sharing.counted(self._engine.load())

    @property
    def published(self) -> tuple[AttemptId, ...]:
        """Attempts that are, or may be, under a lease."""
        return self._publisher.live()

    def check_integrity(self) -> None:
        """Raises InternalError when blocks, attempts or leases are not accounted for."""
        self._engine.check_integrity()
        self._publisher.check_integrity()

    # -- HandoffService ------------------------------------------------------------------------

    async def pair(self, stream: Duplex[PrefillMessage, DecodeMessage]) -> None:
        self._pairs.add(stream)
        try:
            await self._publisher.serve(stream)
        finally:
            self._pairs.discard(stream)

    # -- Duty ----------------------------------------------------------------------------------

    def start(self, message: StartPrefill | StartDecode) -> None:
        if isinstance(message, StartDecode):
            raise InvalidRequest("a prefill worker does not decode: send StartPrefill")
        attempt = message.task.attempt
        self._endings.begin(attempt)
        try:
            fetchable = self.sharing.plan(attempt, message.fetch)
            self._engine.submit(message.task, hand_off=True, fetchable=fetchable)
            self.sharing.pin(message.task)
        except BatonError as error:
            self.sharing.forget(attempt)
            self._endings.forget(attempt)
            self._publisher.finish_without_handoff(attempt, to_wire(error))
            raise
        self._publisher.expect(attempt)

    def cancel(self, attempt: AttemptId, reason: str) -> None:
        self._engine.cancel(attempt)
        self.sharing.forget(attempt)

    # -- EngineListener ------------------------------------------------------------------------

    def on_kv_ready(self, ready: tuple[KvReady, ...]) -> None:
        for kv in ready:
            self._publisher.publish(
                kv.attempt, kv.first_block, kv.blocks, kv.layer_begin, kv.layer_end
            )

    def on_prefilled(
        self, attempt: AttemptId, first: SampledToken, num_blocks: int, cached_tokens: int
    ) -> None:
        self._publisher.prefilled(attempt, first, num_blocks, cached_tokens)

    def on_kv_wanted(self, wanted: tuple[KvWanted, ...]) -> None:
        self.sharing.on_kv_wanted(wanted)

    def on_kv_filled(self, filled: tuple[KvFilled, ...]) -> None:
        self.sharing.on_kv_filled(filled)

    def on_outputs(self, outputs: tuple[AttemptOutput, ...]) -> None:
        self.sharing.on_outputs(outputs)
        self._endings.on_outputs(outputs, self._publisher)

    def on_blocks_changed(self) -> None:
        self.links.load_changed()
