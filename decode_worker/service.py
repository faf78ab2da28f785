"""The decode service: take KV over from prefill workers, or compute prompts here, and generate."""

from __future__ import annotations

import asyncio

from baton.engine.events import KvFilled, KvReady, KvWanted
from baton.errors import BatonError, InternalError, InvalidRequest
from baton.kv.handoff.reader import HandoffReader
from baton.rpc.grpc_server import RpcServer
from baton.rpc.services import BlocksDialer, HandoffDialer
from baton.types.fleet import WorkerLoad
from baton.types.link import StartDecode, StartPrefill
from baton.types.request import AttemptId, AttemptOutput, SampledToken
from baton.worker.links import LinkServer
from baton.worker.parts import WorkerParts
from baton.worker.sharing import Sharing
from decode_worker.intake import Intake


class DecodeService:
    """Implements Duty and EngineListener."""

    def __init__(self, parts: WorkerParts, dialer: HandoffDialer, blocks: BlocksDialer) -> None:
        self._engine = parts.make_engine(self)
        self.sharing = Sharing(parts, self._engine, blocks)
        self.links = LinkServer(
            self,
            self.load,
            self.sharing.news,
            parts.orphan_timeout_s,
            parts.metrics.kv_event_lag,
        )
        self._reader = HandoffReader(
            parts.identity,
            parts.shared.view(),
            parts.memory,
            dialer,
            self._engine.quarantine,
            self._engine.end_quarantine,
            parts.handoff,
            parts.metrics.handoff,
        )
        self._intake = Intake(self._engine, self._reader, self.links.report, self.links.begun)

    # -- process -------------------------------------------------------------------------------

    def serve_on(self, server: RpcServer) -> None:
        server.add_worker(self.links)
        self.sharing.serve_on(server)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._reader.run(), name="reader")
            taking = group.create_task(self._intake.run(), name="intake")
            sharing = group.create_task(self.sharing.run(), name="sharing")
            await self._engine.run()
            sharing.cancel()
            taking.cancel()
            await asyncio.wait([taking])  # before the reader, which ends its transfers
            reading.cancel()

    async def wait_idle(self) -> None:
        await self.links.wait_idle()

    async def aclose(self) -> None:
        await self.links.aclose()
        await self.sharing.aclose()
        self._engine.stop()

    def load(self) -> WorkerLoad:
        return self.sharing.counted(self._engine.load())

    def check_integrity(self) -> None:
        """Raises InternalError when blocks or attempts are not accounted for."""
        self._engine.check_integrity()

    # -- Duty ----------------------------------------------------------------------------------

    def start(self, message: StartPrefill | StartDecode) -> None:
        if isinstance(message, StartPrefill):
            raise InvalidRequest("a decode worker does not hand over: send StartDecode")
        if message.prefill is None:
            self._submit(message)
        else:
            self._intake.start(message.task, message.prefill)

    def _submit(self, message: StartDecode) -> None:
        attempt = message.task.attempt
        try:
            self._engine.submit(message.task, fetchable=self.sharing.plan(attempt, message.fetch))
            self.sharing.pin(message.task)
        except BatonError:
            self.sharing.forget(attempt)
            raise

    def cancel(self, attempt: AttemptId, reason: str) -> None:
        if not self._intake.cancel(attempt):
            self._engine.cancel(attempt)
            self.sharing.forget(attempt)

    # -- EngineListener ------------------------------------------------------------------------

    def on_kv_ready(self, ready: tuple[KvReady, ...]) -> None:
        raise InternalError("a decode worker publishes nothing")

    def on_prefilled(
        self, attempt: AttemptId, first: SampledToken, num_blocks: int, cached_tokens: int
    ) -> None:
        raise InternalError("a decode worker hands nothing over")

    def on_kv_wanted(self, wanted: tuple[KvWanted, ...]) -> None:
        self.sharing.on_kv_wanted(wanted)

    def on_kv_filled(self, filled: tuple[KvFilled, ...]) -> None:
        self.sharing.on_kv_filled(filled)

    def on_outputs(self, outputs: tuple[AttemptOutput, ...]) -> None:
        self.sharing.on_outputs(outputs)
        self.links.report(outputs)

    def on_blocks_changed(self) -> None:
        self.links.load_changed()
