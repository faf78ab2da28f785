"""What a worker is made of, however it was put together. No torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from baton.cpus import Placement, format_cpus
from baton.engine.batch import Runner
from baton.engine.block_pool import BlockPool
from baton.engine.config import EngineConfig
from baton.engine.events import EngineListener
from baton.engine.loop import Engine
from baton.engine.step import MakeSteps, StepThreads
from baton.kv.handoff.options import HandoffOptions
from baton.kv.identity import Identity
from baton.kv.transport.base import PoolMemory, Transport
from baton.kv.transport.shared import SharedTransport
from baton.rpc.tls import Certificates
from baton.types.fleet import Role, WorkerInfo
from baton.types.kv_events import Tier
from baton.worker.links import ORPHAN_S
from baton.worker.metrics import WorkerMetrics


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a service is made of. `close` ends what `build` began."""

    identity: Identity
    model_name: str
    device: str
    placement: Placement
    transport: Transport
    memory: PoolMemory
    runner: Runner
    engine: EngineConfig
    handoff: HandoffOptions
    node: str
    shared: SharedTransport  # of `transport`
    store: str = ""  # host:port of the node's store
    pair_to_token: float = 0.0  # as in the registration
    early_prefill: bool = False  # begin when the first layers of a fetched prefix have come
    orphan_timeout_s: float = ORPHAN_S
    tls: Certificates | None = None  # what peers are shown, and checked by
    wall_clock: Callable[[], float] = time.time
    make_steps: MakeSteps = StepThreads
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)

    def make_engine(self, listener: EngineListener) -> Engine:
        """The worker's one engine, over an empty pool."""
        pool = BlockPool(self.engine.num_blocks)
        return Engine(
            self.runner,
            pool,
            self.engine,
            listener,
            self.wall_clock,
            self.make_steps,
            self.metrics.engine,
        )

    def note_fetch(self, tier: Tier, seconds: float, came: int, wanted: int) -> None:
        """Of `wanted` blocks, so many were read from somebody else's tier."""
        layout = self.identity.layout
        tokens, nbytes = came * layout.block_size, came * layout.block_bytes
        self.metrics.fetches.note(tier, seconds, tokens, nbytes, came == wanted)

    def reborn(self, incarnation: str) -> WorkerParts:
        """For another life of the worker in the same process, after the one before has ended: the
        weights, the memory and what was counted stay, and nothing is in the memory that anybody
        could still ask for."""
        identity = replace(self.identity, incarnation=incarnation)
        return replace(self, identity=identity, shared=SharedTransport(self.transport))

    def info(self, role: Role, address: str, roles: tuple[Role, ...] = ()) -> WorkerInfo:
        """The registration for `role`, of a worker that can be given `roles`."""
        return WorkerInfo(
            name=self.identity.name,
            role=role,
            incarnation=self.identity.incarnation,
            address=address,
            pid=os.getpid(),
            model_name=self.model_name,
            layout=self.identity.layout,
            num_blocks=self.engine.num_blocks,
            max_model_len=self.engine.max_model_len,
            transport=self.transport.name,
            device=self.device,
            cpus=format_cpus(self.placement.cpus),
            threads=self.placement.threads,
            node=self.node,
            roles=roles,
            pair_to_token=self.pair_to_token,
            step_tokens=self.engine.max_batch_tokens,
        )

    async def close(self) -> None:
        self.runner.close()
        await self.transport.close()
