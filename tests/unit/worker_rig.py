"""Prefill and decode services on a fake runner over in-memory streams and loopback transport.

The test plays the conductor. The KV that the runner writes lies in the pool's bytes, in every
layer, so an answer is only right when every layer of every block arrived.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from baton.cpus import Placement
from baton.engine.batch import Batch
from baton.engine.config import EngineConfig
from baton.errors import PeerGone
from baton.kv.digest import Verify
from baton.kv.handoff.options import HandoffOptions
from baton.kv.identity import Identity
from baton.kv.transport.base import PoolMemory
from baton.kv.transport.loopback import FaultPlan, LoopbackFabric, LoopbackTransport
from baton.kv.transport.shared import SharedTransport
from baton.rpc.memory import MemoryNetwork
from baton.rpc.services import Duplex
from baton.types.fleet import BlockState, KvLayout, Peer, WorkerLoad
from baton.types.kv_events import KvEvents, KvSnapshot
from baton.types.link import ConductorMessage, StepReport, WorkerMessage
from baton.types.request import AttemptId, Finish
from baton.worker.links import ORPHAN_S
from baton.worker.metrics import WorkerMetrics
from baton.worker.parts import WorkerParts
from decode_worker.service import DecodeService
from prefill_worker.service import PrefillService
from tests.fake_runner import VOCAB, FakeMemory, FakeRunner, fake_layout

LAYOUT = fake_layout(block_size=4, num_layers=4)
BLOCKS = 64
OPTIONS = HandoffOptions(lease_ttl_s=5.0, hello_timeout_s=5.0, verify=Verify.FULL)
PREFILL, DECODE = "prefill:1", "decode:1"
PATIENCE_S = 20.0


class PoolKv(FakeMemory):
    """KV in a pool's bytes: (position, token) of each slot, in every layer."""

    def __init__(self, memory: PoolMemory, layout: KvLayout) -> None:
        super().__init__()
        cells = np.frombuffer(memory.buffer, dtype=np.int32)  # type: ignore[call-overload]
        shape = (-1, layout.num_layers, 2, layout.kv_heads, layout.block_size, layout.head_dim)
        self._cells = cells.reshape(shape)

    def write(self, block: int, slot: int, position: int, token: int) -> None:
        self._cells[block, :, :, :, slot, :2] = (position, token)

    def read(self, block: int, slot: int) -> tuple[int, int]:
        places = self._cells[block, :, :, :, slot, :2].reshape(-1, 2)
        assert (places == places[0]).all(), f"the layers of block {block} hold different KV"
        return int(places[0, 0]), int(places[0, 1])


@dataclass
class Conductor:
    """One link, and everything that was said on it."""

    stream: Duplex[ConductorMessage, WorkerMessage]
    tokens: dict[AttemptId, dict[int, int]] = field(default_factory=dict)
    finishes: dict[AttemptId, Finish] = field(default_factory=dict)
    loads: list[WorkerLoad] = field(default_factory=list)
    news: list[KvEvents | KvSnapshot] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self) -> None:
        try:
            while True:
                report = await self.stream.receive()
                if not isinstance(report, StepReport):
                    self.news.append(report)
                    self.changed.set()
                    continue
                self.loads.append(report.load)
                for output in report.outputs:
                    assert output.attempt not in self.finishes, "output after the finish"
                    answer = self.tokens.setdefault(output.attempt, {})
                    for token in output.tokens:
                        assert token.index not in answer, "a token came twice"
                        answer[token.index] = token.token_id
                    if output.finish is not None:
                        self.finishes[output.attempt] = output.finish
                self.changed.set()
        except PeerGone:
            return

    async def send(self, message: ConductorMessage) -> None:
        await self.stream.send(message)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def finish(self, attempt: AttemptId) -> Finish:
        await self.until(lambda: attempt in self.finishes)
        return self.finishes[attempt]

    async def token(self, attempt: AttemptId) -> None:
        """Wait for a first token."""
        await self.until(lambda: bool(self.tokens.get(attempt)))

    def answer(self, attempt: AttemptId) -> list[int]:
        found = self.tokens.get(attempt, {})
        return [found[index] for index in sorted(found)]


@dataclass
class Pair:
    """A prefill and a decode worker, and a conductor's link to each."""

    network: MemoryNetwork
    prefill: PrefillService
    decode: DecodeService
    peer: Peer
    to_prefill: Conductor
    to_decode: Conductor
    prefill_runner: FakeRunner
    prefill_metrics: WorkerMetrics
    decode_metrics: WorkerMetrics

    def answer(self, attempt: AttemptId) -> list[int]:
        both = self.to_prefill.tokens.get(attempt, {}) | self.to_decode.tokens.get(attempt, {})
        assert sorted(both) == list(range(len(both)))
        return [both[index] for index in sorted(both)]

    async def until_idle(self) -> None:
        """Every block of both pools is free or cached, and all books agree."""
        async with asyncio.timeout(PATIENCE_S):
            while not (is_idle(self.prefill.load()) and is_idle(self.decode.load())):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        self.prefill.check_integrity()
        self.decode.check_integrity()


def is_idle(load: WorkerLoad) -> bool:
    settled = load.blocks_in(BlockState.FREE, BlockState.CACHED)
    return (load.running, load.waiting) == (0, 0) and settled == BLOCKS


async def make_parts(
    name: str,
    fabric: LoopbackFabric,
    before_step: Callable[[Batch], None] = lambda batch: None,
    options: HandoffOptions = OPTIONS,
    layout: KvLayout = LAYOUT,
    **settings: Any,
) -> WorkerParts:
    identity = Identity(name, f"{name}-life", layout)
    transport = LoopbackTransport(f"{name}/{identity.incarnation}", fabric)
    await transport.start()
    memory = transport.allocate(BLOCKS * layout.block_bytes)
    values: dict[str, Any] = {"max_model_len": 200, "max_num_seqs": 8, "max_batch_tokens": 16}
    values |= {"eos_token_ids": (), "layer_groups": 2, "vocab_size": VOCAB, **settings}
    runner = FakeRunner(layout, PoolKv(memory, layout), values["layer_groups"], before_step)
    engine = EngineConfig(layout, BLOCKS, **values)
    placement = Placement((0,), 1)
    return WorkerParts(
        identity,
        "demo",
        "cpu",
        placement,
        transport,
        memory,
        runner,
        engine,
        options,
        "host",
        SharedTransport(transport),
    )


@asynccontextmanager
async def running_pair(
    plan: FaultPlan | None = None,
    before_prefill: Callable[[Batch], None] = lambda batch: None,
    before_decode: Callable[[Batch], None] = lambda batch: None,
    options: HandoffOptions = OPTIONS,
    orphan_timeout_s: float = ORPHAN_S,
    fabric: LoopbackFabric | None = None,
    store: str = "",
    **settings: Any,
) -> AsyncIterator[Pair]:
    """Both services, linked; afterwards nothing may be left in them. `store` is an address."""
    fabric = fabric or LoopbackFabric(plan)
    ours = await make_parts("p", fabric, before_prefill, options, **settings)
    theirs = await make_parts("d", fabric, before_decode, options, **settings)
    ours = replace(ours, store=store)
    theirs = replace(theirs, store=store, orphan_timeout_s=orphan_timeout_s)
    async with MemoryNetwork() as network:
        prefill = PrefillService(ours, network.blocks_dialer(PREFILL))
        decode = DecodeService(
            theirs, network.handoff_dialer(DECODE), network.blocks_dialer(DECODE)
        )
        network.add_worker(PREFILL, prefill.links)
        network.add_handoff(PREFILL, prefill)
        network.add_blocks(PREFILL, prefill.sharing.server)
        network.add_blocks(DECODE, decode.sharing.server)
        network.add_worker(DECODE, decode.links)
        peer = Peer("p", ours.identity.incarnation, PREFILL)
        async with asyncio.TaskGroup() as group:
            group.create_task(prefill.run())
            group.create_task(decode.run())
            dialer = network.worker_dialer("conductor")
            links = [Conductor(await dialer.link(at, 1.0)) for at in (PREFILL, DECODE)]
            for link in links:
                group.create_task(link.listen())
            assert isinstance(ours.runner, FakeRunner)
            pair = Pair(
                network,
                prefill,
                decode,
                peer,
                links[0],
                links[1],
                ours.runner,
                ours.metrics,
                theirs.metrics,
            )
            yield pair
            await pair.until_idle()
            await prefill.aclose()
            await decode.aclose()
            for link in links:
                await link.stream.aclose()
    await ours.close()
    await theirs.close()
