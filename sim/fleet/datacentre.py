"""The processes of a modelled datacentre: production code on modelled devices and links.

One node has one worker, and a store where there is a CPU tier. What is counted in tokens in
production is counted in units here; bytes, seconds and blocks are real.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from random import Random

import tokenizers

from baton.cpus import Placement
from baton.engine.config import EngineConfig
from baton.kv.digest import Verify
from baton.kv.handoff.options import HandoffOptions
from baton.kv.identity import Identity, life
from baton.kv.transport.shared import SharedTransport
from baton.rpc.memory import MemoryNetwork
from baton.tokenizer import Tokenizer, TokenizerConfig
from baton.types.fleet import Role, WorkerState
from baton.worker.lives import live_on
from baton.worker.parts import WorkerParts
from baton.worker.serving import Service
from conductor.admission import Slos, TpotBy
from conductor.cost_model import UNKNOWN_WORKER, WorkerCost
from conductor.estimate import Fetch
from conductor.planner import PlannerOptions
from conductor.policies import RoutePolicy
from conductor.retries import RetryOptions
from conductor.router import RouteOptions
from conductor.service import Conductor, Policy, ServedModel
from decode_worker.service import DecodeService
from prefill_worker.service import PrefillService
from sim.fleet.device import ModelledDevice
from sim.fleet.hardware import Hardware
from sim.fleet.host import CONDUCTOR, Host
from sim.fleet.prompts import VOCABULARY
from sim.fleet.spec import Admission, Cache, FleetSpec
from sim.fleet.store import make_store, store_info
from sim.fleet.transport import Fabric, ModelledTransport, Place
from sim.steps import Compute, ModelledSteps

START_S = 10.0
POLL_S = 0.01
LEASE_TTL_S = 60.0  # of everything: nobody dies here, so nobody has to notice it soon

_TPOT_BY = {
    Admission.ASSIGNED: TpotBy.ASSIGNED,
    Admission.LOAD: TpotBy.NOW,
    Admission.PREDICTION: TpotBy.PREDICTED,
}
_FETCH = {Cache.NONE: Fetch.NOBODY, Cache.LOCAL: Fetch.NODE, Cache.GLOBAL: Fetch.CLUSTER}


class Datacentre:
    """Use it as an async context manager, in the loop in which it was made; leaving it checks the
    books of every process, and stops it as SIGTERM does. A node is called as its worker."""

    def __init__(self, spec: FleetSpec) -> None:
        self.spec = spec
        self.hardware = Hardware(spec)
        self.hosts: list[Host] = []
        self.roles: list[tuple[float, str]] = []  # what became of them, and when (loop time)
        self._layout = self.hardware.layout
        self._network = MemoryNetwork()
        self._fabric = Fabric(self.hardware)
        self.conductor = self._make_conductor()
        self._serving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Datacentre:
        self._serving = asyncio.create_task(self.conductor.run(), name=CONDUCTOR)
        for number in range(self.spec.prefill):
            await self._start_node(f"p{number}", Role.PREFILL)
        for number in range(self.spec.decode):
            await self._start_node(f"{'m' if self.spec.coupled else 'd'}{number}", Role.DECODE)
        async with asyncio.timeout(START_S):
            while not self._all_live():  # noqa: ASYNC110 (no event)
                await asyncio.sleep(POLL_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        for host in self.hosts:
            host.check_integrity()
            host.signals.stop.set()
        await asyncio.gather(*(host.main for host in self.hosts if host.main is not None))
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving])
        async with self._network:
            """Every stream has ended; this waits for what served them."""

    def _all_live(self) -> bool:
        states = [worker.state for worker in self.conductor.fleet.view().workers]
        return len(states) == len(self.hosts) and set(states) == {WorkerState.LIVE}

    # -- assembling ----------------------------------------------------------------------------

    def _make_conductor(self) -> Conductor:
        spec = self.spec
        draw = Random(spec.seed)
        policy = Policy(
            lease_ttl_s=LEASE_TTL_S,
            max_answers=1 << 30,
            default_deadline_s=spec.deadline_s,
            routing=self._routing(),
            slos=self._slos(),
            retries=RetryOptions(seed=draw.getrandbits(32)),
            prior=_in_units(UNKNOWN_WORKER, spec.grain),
            planner=self._planner(),
        )
        limit = spec.max_model_len // spec.grain
        model = ServedModel(spec.model, _wordless(), VOCABULARY, limit, ())
        dialer = self._network.worker_dialer(CONDUCTOR)
        conductor = Conductor(model, dialer, policy, lambda: f"{draw.getrandbits(64):016x}")
        self._network.add_fleet(CONDUCTOR, conductor.fleet)
        return conductor

    def _routing(self) -> RouteOptions:
        spec = self.spec
        policy, fetch = RoutePolicy(spec.policy), _FETCH[spec.cache]
        return RouteOptions(policy, self._local_units(), fetch, spec.patience)

    def _slos(self) -> Slos:
        spec = self.spec
        if spec.admission is Admission.OFF:
            return Slos()
        return Slos(spec.slo_ttft_s, spec.slo_tbt_s * spec.grain, _TPOT_BY[spec.admission])

    def _planner(self) -> PlannerOptions | None:
        """It aims at the SLO of TBT, also where nobody is refused because of it."""
        if not self.spec.elastic:
            return None
        return PlannerOptions(tpot_s=self.spec.slo_tbt_s * self.spec.grain)

    def _local_units(self) -> int | None:
        local = self.spec.local_tokens
        return None if local < 0 else local // self.spec.grain

    async def _start_node(self, name: str, role: Role) -> None:
        """A store stands where prompts are computed: what decode workers add is of this answer."""
        spec = self.spec
        self.hardware.add_node(name)
        computes = spec.coupled or spec.elastic or role is Role.PREFILL
        has_store = spec.store_blocks > 0 and computes
        if has_store:
            await self._start_store(f"store-{name}", name)
        await self._start_worker(name, role, f"store-{name}" if has_store else "")

    async def _start_store(self, name: str, node: str) -> None:
        spec, identity = self.spec, Identity(name, "1", self._layout)
        transport = await self._transport(name, Place(node, host=True))
        slots, carry = spec.store_blocks, partial(self.hardware.carry_nvme, node)
        store, service = await make_store(
            identity, transport, slots, spec.eviction, LEASE_TTL_S, spec.nvme_blocks, carry
        )
        self._network.add_worker(name, service.links)
        self._network.add_blocks(name, service.blocks)
        info = store_info(identity, spec.model, node, slots)
        host = self._host(name, None)
        host.begin(Role.STORE, service, store.check_integrity)

        async def live() -> None:
            await host.serve(lambda _: info, service)
            await store.close()
            await transport.close()

        host.main = asyncio.create_task(live(), name=f"main {name}")

    async def _start_worker(self, name: str, role: Role, store: str) -> None:
        identity = Identity(name, "1", self._layout)
        transport = await self._transport(name, Place(name))
        device = self._device()
        parts = self._parts(identity, role, transport, device, store)
        host = self._host(name, device)
        roles = (Role.PREFILL, Role.DECODE) if self.spec.elastic else (role,)
        makes = {each: partial(self._make_service, host, each) for each in roles}

        async def live() -> None:
            await live_on(parts, role, makes, host.serve, host.name_life)
            await transport.close()

        host.main = asyncio.create_task(live(), name=f"main {name}")

    def _make_service(self, host: Host, role: Role, parts: WorkerParts) -> Service:
        """For a life of the worker, on the network."""
        name, network = host.name, self._network
        parts = replace(parts, engine=self._engine(role))
        blocks = network.blocks_dialer(name)
        service: PrefillService | DecodeService
        if role is Role.PREFILL:
            service = prefill = PrefillService(parts, blocks)
            network.add_handoff(name, prefill)
        else:
            service = DecodeService(parts, network.handoff_dialer(name), blocks)
        network.add_worker(name, service.links)
        network.add_blocks(name, service.sharing.server)
        host.begin(role, service, service.check_integrity)
        return service

    async def _transport(self, name: str, place: Place) -> ModelledTransport:
        transport = ModelledTransport(life(name, "1"), place, self._fabric)
        await transport.start()
        return transport

    def _host(self, name: str, device: ModelledDevice | None) -> Host:
        host = Host(name, self._network, device, self._note_role)
        self.hosts.append(host)
        return host

    def _note_role(self, worker: str, role: Role, taken: bool) -> None:
        elastic = self.conductor.elastic
        text = f"{worker} is a {role} worker now"
        if not taken and elastic is not None and elastic.last is not None:
            text = f"{worker} is to {role}: {elastic.last.move.reason}"
        self.roles.append((asyncio.get_running_loop().time(), text))

    def _device(self) -> ModelledDevice:
        spec = self.spec
        layers = (self._layout.num_layers,)
        return ModelledDevice(self.hardware.cost, spec.grain, spec.mixed_tokens, layers)

    def _parts(
        self,
        identity: Identity,
        role: Role,
        transport: ModelledTransport,
        device: ModelledDevice,
        store: str,
    ) -> WorkerParts:
        spec, layout = self.spec, self._layout
        memory = transport.allocate(self.hardware.kv_blocks * layout.block_bytes)
        handoff = HandoffOptions(
            lease_ttl_s=LEASE_TTL_S, attach_timeout_s=LEASE_TTL_S, verify=Verify.OFF
        )
        return WorkerParts(
            identity=identity,
            model_name=spec.model,
            device="modelled",
            placement=Placement((0,), 1),
            transport=transport,
            memory=memory,
            runner=device,
            engine=self._engine(role),
            handoff=handoff,
            node=transport.place.node,
            shared=SharedTransport(transport),
            store=store,
            pair_to_token=self.hardware.pair_to_token,
            wall_clock=asyncio.get_running_loop().time,
            make_steps=lambda _, wake: ModelledSteps(
                device, device, _full_speed, wake, self._compute(identity.name, device)
            ),
        )

    def _compute(self, worker: str, device: ModelledDevice) -> Compute | None:
        machine = self.hardware.machine
        if machine is None:
            return None
        return lambda seconds, done: machine.step(worker, device.kind, seconds, done)

    def _engine(self, role: Role) -> EngineConfig:
        spec = self.spec
        if role is Role.DECODE:
            # A step that decodes stands for `grain` of them, so it has room for as many chunks,
            # unless it has none because prompts go first.
            alone = spec.prompts_first
            units = spec.mixed_tokens // spec.grain if alone else spec.mixed_tokens
            sequences, units = spec.max_seqs, max(units, spec.max_seqs)
        else:
            units = spec.chunk_tokens // spec.grain
            sequences = min(spec.max_seqs, units)  # a step must have room for one unit of each
        return EngineConfig(
            self._layout,
            self.hardware.kv_blocks,
            spec.max_model_len // spec.grain,
            max_num_seqs=sequences,
            max_batch_tokens=units,
            max_waiting=1 << 20,
            prefix_caching=spec.cache is not Cache.NONE,
            prompts_first=spec.prompts_first,
        )


def _in_units(cost: WorkerCost, grain: int) -> WorkerCost:
    """What the conductor assumes of tokens, said of units."""
    prefill, decode = cost.prefill, cost.decode
    return WorkerCost(
        replace(prefill, token_s=prefill.token_s * grain, pair_s=prefill.pair_s * grain**2),
        replace(decode, base_s=decode.base_s * grain, sequence_s=decode.sequence_s * grain),
    )


def _wordless() -> Tokenizer:
    """Answers have no text."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({}, unk_token=""))
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, TokenizerConfig({}))


def _full_speed() -> float:
    return 1.0
