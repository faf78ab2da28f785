"""Transport over NIXL (UCX): RDMA, NVLink, CMA between processes of a host, TCP.

Reads go out in slices of at most SLICE bytes, so that one long prompt does not hold up the others
and an abort is prompt. When all copies of a read are multiples of one unit, they are indices into
descriptor lists that were prepared once per peer: no per-read address tables are built.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from baton.errors import ConfigError, InternalError, TransportError
from baton.kv.transport.base import Copy, PoolMemory
from baton.kv.transport.memory import cpu_pool, make_pool
from baton.kv.transport.nixl_agent import AgentThread, Job
from baton.kv.transport.transfer import (
    PendingTransfer,
    check_copies,
    refused_endpoint,
    unknown_peer,
)

SLICE = 8 << 20  # bytes per posted transfer: 1–2 ms over CMA
UNIT_MIN = 4096  # bytes; below this, prepared lists would be mostly bookkeeping
UNITS_MAX = 1 << 20  # entries of a prepared list
PREPARED_MAX = 4  # prepared lists per peer
CONNECT_S = 10.0
CLOSE_S = 5.0
SCRATCH = 64  # bytes that a peer reads to set the connection up

_log = logging.getLogger(__name__)

Indices = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Region:
    """A registered pool, ours or a peer's."""

    address: int
    nbytes: int
    kind: str  # NIXL's memory type: DRAM | VRAM
    device: int

    def descriptors(self, offsets: Sequence[int], lengths: Sequence[int]) -> npt.NDArray[np.uint64]:
        """[n, 3] rows of (address, length, device)."""
        rows = np.empty((len(offsets), 3), dtype=np.uint64)
        rows[:, 0] = np.asarray(offsets, dtype=np.uint64) + np.uint64(self.address)
        rows[:, 1] = lengths
        rows[:, 2] = self.device
        return rows


@dataclass(slots=True)
class _Source:
    """A connected peer. `prepared` is used on the agent thread only."""

    agent: str
    pool: _Region
    scratch: _Region
    prepared: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    warm_up: PendingTransfer | None = None


class NixlTransport:
    name = "nixl"

    def __init__(self, worker: str) -> None:
        self._thread = AgentThread(f"{worker}/{uuid4().hex}")
        self._memory: PoolMemory | None = None
        self._pool: _Region | None = None
        self._scratch_memory: PoolMemory | None = None
        self._scratch: _Region | None = None
        self._metadata = b""
        self._sources: dict[str, _Source] = {}
        self._transfers: set[PendingTransfer] = set()
        self._started = False

    async def start(self) -> None:
        """Raises ConfigError when NIXL or its UCX backend does not work here."""
        try:
            await self._thread.start(lambda: make_agent(self._thread.agent_name))
        except Exception as error:
            await self._thread.stop()
            raise ConfigError(
                f"NIXL does not work here ({error}); install baton-llm[nixl] or use --transport shm"
            ) from error
        self._started = True

    def allocate(self, nbytes: int, device: str = "cpu", backing: Path | None = None) -> PoolMemory:
        if self._memory is not None:
            raise InternalError("a transport has one pool, and this one has it already")
        memory, scratch = make_pool(nbytes, device, backing), cpu_pool(SCRATCH * 2)
        pool_region, scratch_region = _region(memory), _region(scratch)
        self._thread.call(lambda: self._register(pool_region, scratch_region)).result(CLOSE_S * 12)
        self._memory, self._scratch_memory = memory, scratch
        self._pool, self._scratch = pool_region, scratch_region
        return memory

    def _register(self, *regions: _Region) -> None:
        agent = self._thread.agent
        for r in regions:
            agent.register_memory([(r.address, r.nbytes, r.device, "")], mem_type=r.kind)
        self._metadata = agent.get_agent_metadata()

    def endpoint(self) -> bytes:
        pool, scratch = self._regions()
        head = [
            self._thread.agent_name,
            [pool.address, pool.nbytes, pool.kind, pool.device],
            [scratch.address, scratch.nbytes, scratch.kind, scratch.device],
        ]
        return json.dumps(head).encode() + b"\n" + self._metadata

    async def connect(self, peer: str, endpoint: bytes) -> None:
        """Also starts to read a few bytes, because the first read of a pair sets the connection up
        (tens of milliseconds) and needs the peer's progress for it: both sides do it here."""
        self._regions()
        await self.disconnect(peer)
        try:
            head, _, metadata = endpoint.partition(b"\n")
            agent, pool, scratch = json.loads(head)
            source = _Source(str(agent), _Region(*pool), _Region(*scratch))
            add = self._thread.call(lambda: self._thread.agent.add_remote_agent(metadata))
            async with asyncio.timeout(CONNECT_S):
                await asyncio.wrap_future(add)
        except Exception as error:
            raise refused_endpoint(peer, self.name, error) from error
        self._sources[peer] = source
        source.warm_up = self._submit(peer, self._warm_up(source))

    async def disconnect(self, peer: str) -> None:
        source = self._sources.pop(peer, None)
        if source is None:
            return
        for transfer in self._transfers:
            if transfer.peer == peer:
                transfer.settle(TransportError(f"read from {peer} failed: it was disconnected"))
                transfer.stop()
        forget = self._thread.call(lambda: self._forget(source))
        await asyncio.wait([asyncio.wrap_future(forget)], timeout=CONNECT_S)

    def _forget(self, source: _Source) -> None:
        """On the agent thread. NIXL ends what is under way towards the peer."""
        for ours, theirs in source.prepared.values():
            theirs.release()
            ours.release()
        source.prepared.clear()
        try:
            self._thread.agent.remove_remote_agent(source.agent)
        except Exception as error:  # gone already: what we wanted
            _log.debug("NIXL could not forget %s: %s", source.agent, error)

    def read(self, peer: str, copies: Sequence[Copy]) -> PendingTransfer:
        source = self._sources.get(peer)
        if source is None:
            raise unknown_peer(peer)
        pool, _ = self._regions()
        check_copies(copies, pool.nbytes, source.pool.nbytes, peer)
        return self._submit(peer, self._slices(source, tuple(copies)))

    def _submit(
        self, peer: str, slices: Iterator[tuple[Callable[[], Any], int]]
    ) -> PendingTransfer:
        transfer = PendingTransfer(peer, self._thread.kick, self._transfers.discard)
        self._transfers.add(transfer)
        self._thread.submit(Job(transfer, slices))
        return transfer

    @contextmanager
    def serving(self, peer: str) -> Iterator[None]:
        self._thread.serve(1)
        try:
            yield
        finally:
            self._thread.serve(-1)

    async def close(self) -> None:
        if not self._started:
            return
        self._started = False
        for peer in list(self._sources):
            await self.disconnect(peer)
        aborts = [asyncio.ensure_future(t.abort()) for t in list(self._transfers)]
        if aborts:
            _, stuck = await asyncio.wait(aborts, timeout=CLOSE_S)
            for abort in stuck:
                abort.cancel()
        await self._thread.stop()
        self._memory = self._scratch_memory = None

    def _regions(self) -> tuple[_Region, _Region]:
        if self._pool is None or self._scratch is None:
            raise InternalError("allocate the pool before connecting or reading")
        return self._pool, self._scratch

    # -- on the agent thread -------------------------------------------------------------------

    def _warm_up(self, source: _Source) -> Iterator[tuple[Callable[[], Any], int]]:
        _, ours = self._regions()
        yield lambda: self._initialize(source, ours, [SCRATCH], source.scratch, [0], [SCRATCH]), 0

    def _slices(
        self, source: _Source, copies: tuple[Copy, ...]
    ) -> Iterator[tuple[Callable[[], Any], int]]:
        """(handle maker, bytes) of at most SLICE bytes each."""
        pool, _ = self._regions()
        unit = _unit(copies, source.prepared, pool.nbytes)
        if unit is None:
            for piece in _pieces(copies):
                make = partial(
                    self._initialize,
                    source,
                    pool,
                    [c.local for c in piece],
                    source.pool,
                    [c.remote for c in piece],
                    [c.length for c in piece],
                )
                yield make, sum(c.length for c in piece)
            return
        agent = self._thread.agent
        ours, theirs = self._prepare(source, unit)
        local, remote = _indices(copies, unit)
        step = max(1, SLICE // unit)
        for at in range(0, len(local), step):
            mine, its = local[at : at + step], remote[at : at + step]
            yield (
                partial(agent.make_prepped_xfer, "READ", ours, mine, theirs, its),
                len(mine) * unit,
            )

    def _prepare(self, source: _Source, unit: int) -> tuple[Any, Any]:
        if unit not in source.prepared:
            pool, _ = self._regions()
            ours = self._prepare_side("", pool, unit)
            source.prepared[unit] = ours, self._prepare_side(source.agent, source.pool, unit)
        return source.prepared[unit]

    def _prepare_side(self, agent: str, region: _Region, unit: int) -> Any:
        offsets = range(0, region.nbytes - unit + 1, unit)
        rows = region.descriptors(offsets, [unit] * len(offsets))
        return self._thread.agent.prep_xfer_dlist(agent, rows, mem_type=region.kind)

    def _initialize(
        self,
        source: _Source,
        ours: _Region,
        local: list[int],
        theirs: _Region,
        remote: list[int],
        lengths: list[int],
    ) -> Any:
        agent = self._thread.agent
        mine = agent.get_xfer_descs(ours.descriptors(local, lengths), mem_type=ours.kind)
        its = agent.get_xfer_descs(theirs.descriptors(remote, lengths), mem_type=theirs.kind)
        return agent.initialize_xfer("READ", mine, its, source.agent)


def make_agent(name: str) -> Any:
    """A NIXL agent with the UCX backend. Raises ImportError or NIXL's own errors."""
    from nixl._api import nixl_agent, nixl_agent_config

    logger = logging.getLogger("nixl")
    logger.handlers.clear()  # it prints to stdout otherwise
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    if "UCX" not in agent.backends:
        raise RuntimeError("NIXL has no UCX backend")
    return agent


def _region(memory: PoolMemory) -> _Region:
    if memory.device == "cpu":
        return _Region(memory.address, memory.nbytes, "DRAM", 0)
    return _Region(memory.address, memory.nbytes, "VRAM", int(memory.device.partition(":")[2] or 0))


def _unit(copies: Sequence[Copy], known: dict[int, Any], pool_bytes: int) -> int | None:
    """The size that all offsets and lengths are multiples of, if lists of it are worthwhile."""
    common = math.gcd(*(n for c in copies for n in (c.remote, c.local, c.length)))
    for unit in known:
        if common % unit == 0:
            return unit
    if common < UNIT_MIN or pool_bytes // common > UNITS_MAX or len(known) >= PREPARED_MAX:
        return None
    return common


def _indices(copies: Sequence[Copy], unit: int) -> tuple[Indices, Indices]:
    """Entry numbers in the prepared lists, local and remote."""
    local = [n for c in copies for n in range(c.local // unit, (c.local + c.length) // unit)]
    remote = [n for c in copies for n in range(c.remote // unit, (c.remote + c.length) // unit)]
    return np.array(local, dtype=np.int32), np.array(remote, dtype=np.int32)


def _pieces(copies: Sequence[Copy]) -> Iterator[list[Copy]]:
    """The copies in groups of at most SLICE bytes; longer ones are cut."""
    group: list[Copy] = []
    room = SLICE
    for copy in copies:
        done = 0
        while done < copy.length:
            size = min(room, copy.length - done)
            group.append(Copy(copy.remote + done, copy.local + done, size))
            done, room = done + size, room - size
            if not room:
                yield group
                group, room = [], SLICE
    if group:
        yield group
