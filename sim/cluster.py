"""The processes of a modelled cluster, assembled as `build.py` of each would: production code on a
modelled runner, over the in-memory services and the loopback transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from random import Random

import tokenizers

from baton.cpus import Placement
from baton.engine.config import EngineConfig
from baton.kv.blocks.options import BlocksOptions
from baton.kv.handoff.options import HandoffOptions
from baton.kv.identity import Identity, life
from baton.kv.transport.base import PoolMemory
from baton.kv.transport.loopback import LoopbackTransport
from baton.kv.transport.shared import SharedTransport
from baton.rpc.registry import Registry
from baton.rpc.registry_memory import MemoryRegistry
from baton.tokenizer import Tokenizer, TokenizerConfig
from baton.types.fleet import KvLayout, Role, WorkerInfo
from baton.types.kv_events import Tier
from baton.types.registry import ConductorInfo
from baton.worker.conductors import ConductorSet
from baton.worker.lifecycle import StopSignals
from baton.worker.parts import WorkerParts
from baton.worker.serving import Service, live
from conductor.admission import Slos
from conductor.announce import announce
from conductor.retries import RetryOptions
from conductor.router import RouteOptions
from conductor.service import Conductor, Policy, ServedModel
from decode_worker.service import DecodeService
from kvstore.eviction import make_policy
from kvstore.format import fingerprint
from kvstore.journal import Journal
from kvstore.memory_tier import MemoryTier
from kvstore.service import StoreService
from kvstore.slot_table import HEADER_BYTES, SlotTable
from kvstore.store import Store
from prefill_worker.service import PrefillService
from sim.disk import DiskPlan, ModelledDisk
from sim.log import EventLog
from sim.loop import Clock
from sim.network import Network
from sim.plan import BLOCK_SIZE, CONDUCTOR, Machine, Shape
from sim.process import Process
from sim.runner import VOCAB, ModelledRunner, modelled_layout
from sim.steps import ModelledSteps, ModelledThreads

MODEL = "modelled"
LINGER_S = 2.0
DRAIN_S = 5.0
HASH_S = 0.002  # of a store, for what it hashes at a time


@dataclass(frozen=True, slots=True)
class Hosted:
    """A running worker or store."""

    process: Process
    service: PrefillService | DecodeService | StoreService
    memory: PoolMemory
    transport: LoopbackTransport
    membership: ConductorSet
    signals: StopSignals
    main: asyncio.Task[None]
    check_integrity: Callable[[], None]


@dataclass(frozen=True, slots=True)
class HostedConductor:
    process: Process
    service: Conductor
    main: asyncio.Task[None]


@dataclass(slots=True)
class _Areas:
    """A store's shared memory, which outlives its process."""

    payload: bytes
    headers: bytearray


class Cluster:
    """Who is alive. The only one that starts and kills processes."""

    def __init__(
        self, shape: Shape, seed: int, network: Network, log: EventLog, slos: Slos | None = None
    ) -> None:
        self.shape = shape
        self._slos = slos or Slos()
        self.network = network
        self.workers: dict[str, Hosted] = {}
        self.conductors: dict[str, HostedConductor] = {}
        self.dead: list[Process] = []
        self.disks: dict[str, ModelledDisk] = {}
        self._log = log
        self._seed = seed
        self._rng = Random(seed ^ 0x1D)
        self._lives: dict[str, int] = {}
        self._areas: dict[str, _Areas] = {}
        self._starting: dict[str, Process] = {}  # workers; a store with a disk takes its time
        self._layout = modelled_layout(BLOCK_SIZE, shape.num_layers)
        self._roles = {machine.name: Role.PREFILL for machine in shape.prefill}
        self._roles |= {machine.name: Role.DECODE for machine in shape.decode}
        self._roles |= {machine.name: Role.STORE for machine in shape.stores}
        self._machines = {machine.name: machine for machine in shape.machines}
        self._conductors = {machine.name: machine for machine in shape.conductors}
        self.registry = network.open_registry() if shape.registry else None

    @property
    def conductor(self) -> HostedConductor | None:
        """The first one, which is often the only one."""
        return self.conductors.get(CONDUCTOR)

    def processes(self) -> list[Process]:
        """Living ones."""
        workers = [hosted.process for hosted in self.workers.values()]
        conductors = [hosted.process for hosted in self.conductors.values()]
        return [*workers, *self._starting.values(), *conductors]

    def process(self, name: str) -> Process | None:
        return next((one for one in self.processes() if one.name == name), None)

    async def start_all(self) -> None:
        for name in (*self._conductors, *self._machines):
            await self.start(name)

    async def start(self, name: str) -> None:
        """A new life of it."""
        if self.process(name) is not None:
            return
        number = self._lives[name] = self._lives.get(name, 0) + 1
        machine = self._machines.get(name) or self._conductors[name]
        clock = Clock(machine.clock_offset, machine.clock_rate)
        process = Process(name, f"{name}.{number}", clock)
        self._log.note(name, "starts", process.incarnation)
        if name in self._conductors:
            self.conductors[name] = process.do(partial(self._start_conductor, process))
        else:
            self._starting[name] = process
            starting = process.spawn(self._start_host(process, machine), "start")
            await asyncio.wait({starting, process.gone}, return_when=asyncio.FIRST_COMPLETED)
            if not process.gone.done():
                del self._starting[name]
                self.workers[name] = starting.result()

    def kill(self, name: str) -> None:
        """SIGKILL: nobody hears a word, and what the process held is gone."""
        process = self.process(name)
        if process is None:
            return
        self._log.note(name, "is killed", process.incarnation)
        process.kill()
        self.dead.append(process)
        if name in self._conductors:
            del self.conductors[name]
        elif self._starting.pop(name, None) is None:
            hosted = self.workers.pop(name)
            hosted.transport.vanish()
            if name in self._areas:
                self._areas[name].payload = bytes(hosted.memory.buffer)  # type: ignore[call-overload]
            hosted.memory.buffer[:] = 0xEE  # type: ignore[index]
        if name in self.disks and self.disks[name].crash():
            del self._areas[name]  # the machine went with it
        self.network.kill(name)

    # -- assembling ----------------------------------------------------------------------------

    def _start_conductor(self, process: Process) -> HostedConductor:
        shape = self.shape
        policy = Policy(
            lease_ttl_s=shape.fleet_ttl_s,
            routing=RouteOptions(local_tokens=shape.local_tokens),
            slos=self._slos,
            retries=RetryOptions(seed=self._rng.getrandbits(32)),
        )
        model = ServedModel(MODEL, numbers(), VOCAB, shape.max_model_len, ())
        dialer = self.network.services.worker_dialer(process.name)
        make_id = lambda: f"{self._rng.getrandbits(64):016x}"  # noqa: E731
        registry = self._registry_of(process.name)
        service = Conductor(model, dialer, policy, make_id, registry)
        self.network.services.add_fleet(process.name, service.fleet)
        main = process.spawn(_conduct(service, registry, process), "conductor")
        return HostedConductor(process, service, main)

    def _registry_of(self, name: str) -> MemoryRegistry | None:
        if self.registry is None:
            return None
        return MemoryRegistry(self.registry, name, self.network)

    async def _start_host(self, process: Process, machine: Machine) -> Hosted:
        """Runs as the process."""
        role = self._roles[process.name]
        identity = Identity(process.name, process.incarnation, self._layout)
        transport = LoopbackTransport(life(*_names(process)), self.network.fabric)
        await transport.start()
        memory = transport.allocate(machine.num_blocks * self._layout.block_bytes)
        service: PrefillService | DecodeService | StoreService
        async with AsyncExitStack() as stack:
            stack.push_async_callback(transport.close)
            if role is Role.STORE:
                service, info, store = await self._make_store(identity, machine, transport, memory)
                stack.push_async_callback(store.close)
                check = store.check_integrity
            else:
                service, info = self._make_worker(role, identity, machine, transport, memory)
                check = service.check_integrity
            close = stack.pop_all()
        connect = partial(self.network.services.fleet_client, process.name)
        told = tuple(self._conductors) if self.shape.told else ()
        registry = self._registry_of(process.name)
        membership = ConductorSet(told, registry, connect, info, service.load)
        signals = StopSignals()
        main = process.spawn(_live(service, membership, signals, close), f"main {process.name}")
        return Hosted(process, service, memory, transport, membership, signals, main, check)

    def _make_worker(
        self,
        role: Role,
        identity: Identity,
        machine: Machine,
        transport: LoopbackTransport,
        memory: PoolMemory,
    ) -> tuple[PrefillService | DecodeService, WorkerInfo]:
        services, name = self.network.services, identity.name
        parts = self._parts(identity, machine, transport, memory)
        blocks = services.blocks_dialer(name)
        service: PrefillService | DecodeService
        if role is Role.PREFILL:
            service = prefill = PrefillService(parts, blocks)
            services.add_handoff(name, prefill)
        else:
            service = DecodeService(parts, services.handoff_dialer(name), blocks)
        services.add_worker(name, service.links)
        services.add_blocks(name, service.sharing.server)
        return service, parts.info(role, name)

    def _parts(
        self,
        identity: Identity,
        machine: Machine,
        transport: LoopbackTransport,
        memory: PoolMemory,
    ) -> WorkerParts:
        shape = self.shape
        runner = ModelledRunner(
            self._layout, memory, shape.layer_groups, self._on_wrong(identity.incarnation)
        )
        engine = EngineConfig(
            self._layout,
            machine.num_blocks,
            shape.max_model_len,
            max_num_seqs=shape.max_num_seqs,
            max_batch_tokens=shape.max_batch_tokens,
            prefix_caching=shape.prefix_caching,
            layer_groups=shape.layer_groups,
        )
        slowness = partial(self.network.slowness, machine.name)
        handoff = HandoffOptions(
            lease_ttl_s=shape.lease_ttl_s,
            attach_timeout_s=5.0,
            hello_timeout_s=5.0,
            linger_s=LINGER_S,
            verify=shape.verify,
        )
        return WorkerParts(
            identity=identity,
            model_name=MODEL,
            device="cpu",
            placement=Placement((0,), 1),
            transport=transport,
            memory=memory,
            runner=runner,
            engine=engine,
            handoff=handoff,
            node="node",
            shared=SharedTransport(transport),
            store=self.shape.stores[0].name if self.shape.stores else "",
            orphan_timeout_s=self.shape.orphan_s,
            wall_clock=asyncio.get_running_loop().time,
            make_steps=lambda _, wake: ModelledSteps(runner, machine.pace, slowness, wake),
        )

    def _on_wrong(self, incarnation: str) -> Callable[[str], None]:
        return lambda what: self._log.violation(f"{incarnation}: {what}")

    async def _make_store(
        self,
        identity: Identity,
        machine: Machine,
        transport: LoopbackTransport,
        memory: PoolMemory,
    ) -> tuple[StoreService, WorkerInfo, Store]:
        layout, slots, name = self._layout, machine.num_blocks, identity.name
        areas = self._areas.setdefault(name, _Areas(b"", bytearray(slots * HEADER_BYTES)))
        view = memoryview(memory.buffer).cast("B")  # type: ignore[arg-type]
        view[: len(areas.payload)] = areas.payload
        table = SlotTable(memoryview(areas.headers), fingerprint(layout), layout.block_bytes)
        journal = Journal()
        policy = make_policy("lru")
        tier = MemoryTier(view, table, layout.block_bytes, policy, journal.of(Tier.CPU))
        disk = None
        if self.shape.disk is not None:
            slowness = partial(self.network.slowness, name)
            disk = self._disk(name, self.shape.disk).make_tier(
                layout, journal.of(Tier.NVME), slowness
            )
        store = Store(tier, disk, journal, threads=ModelledThreads(HASH_S))
        await store.open()
        options = BlocksOptions(
            lease_ttl_s=self.shape.lease_ttl_s,
            hello_timeout_s=5.0,
            take_timeout_s=4.0,
            linger_s=LINGER_S,
            verify=self.shape.verify,
        )
        shared = SharedTransport(transport)
        service = StoreService(store, tier, identity, shared, memory, options)
        self.network.services.add_worker(name, service.links)
        self.network.services.add_blocks(name, service.blocks)
        return service, _store_info(identity, layout, slots), store

    def _disk(self, name: str, plan: DiskPlan) -> ModelledDisk:
        if name not in self.disks:
            rng = Random(self._seed ^ 0xD15C)
            is_calm = lambda: self.network.calm  # noqa: E731
            now = self.network.now
            self.disks[name] = ModelledDisk(plan, name, rng, now, is_calm, self._log)
        return self.disks[name]


async def _conduct(service: Conductor, registry: Registry | None, process: Process) -> None:
    """As the conductor's server does, until cancelled."""
    if registry is None:
        await service.run()
        return
    name = process.name
    info = ConductorInfo(name, process.incarnation, http=name, grpc=name)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(service.run(), name="conductor's core")
        ttl_s, on_new = service.policy.lease_ttl_s, service.records.tell_again
        tasks.create_task(announce(registry, info, ttl_s, on_new), name="lease")


async def _live(
    service: Service, membership: ConductorSet, signals: StopSignals, close: AsyncExitStack
) -> None:
    async with close:
        await live(service, membership, _ready, DRAIN_S, signals)


async def _ready(ready: bool) -> None:
    """Nobody asks."""


def _names(process: Process) -> tuple[str, str]:
    return process.name, process.incarnation


def _store_info(identity: Identity, layout: KvLayout, slots: int) -> WorkerInfo:
    return WorkerInfo(
        name=identity.name,
        role=Role.STORE,
        incarnation=identity.incarnation,
        address=identity.name,
        pid=0,
        model_name=MODEL,
        layout=layout,
        num_blocks=slots,
        max_model_len=0,
        transport="loopback",
        node="node",
    )


@lru_cache(maxsize=1)
def numbers() -> Tokenizer:
    """Token n is the text "n;"."""
    vocabulary = {token_text(n): n for n in range(VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="0;"))
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, TokenizerConfig({}))


def token_text(token: int) -> str:
    return f"{token};"
