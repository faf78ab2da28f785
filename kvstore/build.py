"""Assemble a store from its configuration: layout, shared memory, tiers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from baton.errors import ConfigError
from baton.kv.blocks.options import BlocksOptions
from baton.kv.digest import Verify
from baton.kv.identity import Identity, life, new_incarnation
from baton.kv.transport.base import PoolMemory, Transport
from baton.kv.transport.registry import make_transport
from baton.kv.transport.shared import SharedTransport
from baton.model.hub import resolve_model
from baton.model.spec import choose_dtype, kv_layout, load_spec
from baton.types.fleet import Role, WorkerInfo
from baton.types.kv_events import Tier
from baton.worker.address import reachable_address
from baton.worker.member_metrics import MemberMetrics
from kvstore.config import StoreConfig
from kvstore.disk_options import DiskOptions
from kvstore.disk_tier import DiskTier
from kvstore.eviction import make_policy
from kvstore.format import fingerprint
from kvstore.journal import Journal
from kvstore.memory_tier import MemoryTier
from kvstore.service import StoreService
from kvstore.slot_table import HEADER_BYTES, SlotTable, map_file
from kvstore.store import Store, StoreOptions

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class StoreParts:
    """What the process is made of. `close` ends what `build` began."""

    identity: Identity
    node: str
    model_name: str
    transport: Transport
    memory: PoolMemory
    tier: MemoryTier
    store: Store
    options: BlocksOptions
    files: tuple[Path, ...]  # of the CPU tier
    keep: bool

    def make_service(self, metrics: MemberMetrics | None = None) -> StoreService:
        shared = SharedTransport(self.transport)
        return StoreService(
            self.store,
            self.tier,
            self.identity,
            shared,
            self.memory,
            self.options,
            metrics=metrics,
        )

    def info(self, address: str) -> WorkerInfo:
        """The registration."""
        return WorkerInfo(
            name=self.identity.name,
            role=Role.STORE,
            incarnation=self.identity.incarnation,
            address=address,
            pid=os.getpid(),
            model_name=self.model_name,
            layout=self.identity.layout,
            num_blocks=self.tier.num_slots,
            max_model_len=0,
            transport=self.transport.name,
            node=self.node,
        )

    async def close(self) -> None:
        await self.store.close()
        await self.transport.close()
        if not self.keep:
            for file in self.files:
                file.unlink(missing_ok=True)
            self.files[0].parent.rmdir()


async def build(config: StoreConfig) -> StoreParts:
    """Raises ConfigError, ModelLoadError, TransportError and LayoutMismatch."""
    model_dir = await asyncio.to_thread(resolve_model, config.model or None)
    spec = await asyncio.to_thread(load_spec, model_dir)
    layout = kv_layout(spec, choose_dtype(config.dtype, spec, "cpu"), config.block_size)
    identity = Identity(store_name(config), new_incarnation(), layout)
    slots = config.memory_mib * MIB // layout.block_bytes
    if not slots:
        raise ConfigError(
            f"--memory-mib {config.memory_mib} holds no KV block of {layout.block_bytes} bytes"
        )
    host = reachable_address(config.advertise, config.listen).rpartition(":")[0]
    transport = make_transport(
        config.transport, life(identity.name, identity.incarnation), host=host
    )
    await transport.start()
    try:
        blocks, headers = _files(config, config.memory_name or identity.name)
        nbytes = slots * layout.block_bytes
        memory = await asyncio.to_thread(transport.allocate, nbytes, backing=blocks)
        table = SlotTable(
            _map(headers, slots * HEADER_BYTES),
            fingerprint(layout),
            layout.block_bytes,
        )
        journal = Journal()
        view = memoryview(memory.buffer).cast("B")  # type: ignore[arg-type]
        policy = make_policy(config.eviction)
        tier = MemoryTier(view, table, layout.block_bytes, policy, journal.of(Tier.CPU))
        disk = None
        if config.disk_dir:
            options = DiskOptions(
                Path(config.disk_dir), int(config.disk_gib * GIB), config.disk_segment_mib * MIB
            )
            disk = DiskTier(options, layout, journal.of(Tier.NVME))
        store = Store(tier, disk, journal, StoreOptions(pin_share=config.pin_share))
        await store.open()
    except BaseException:
        with contextlib.suppress(Exception):
            await transport.close()
        raise
    return StoreParts(
        identity=identity,
        node=config.node or socket.gethostname(),
        model_name=config.model_name or model_dir.resolve().name,
        transport=transport,
        memory=memory,
        tier=tier,
        store=store,
        options=BlocksOptions(lease_ttl_s=config.lease_ttl, verify=Verify(config.verify)),
        files=(blocks, headers),
        keep=config.keep_memory,
    )


def store_name(config: StoreConfig) -> str:
    return config.name or f"store-{config.node or socket.gethostname()}"


def _files(config: StoreConfig, name: str) -> tuple[Path, Path]:
    """Of the CPU tier: its blocks, and their headers. Raises ConfigError."""
    safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
    directory = Path(config.memory_dir) / f"baton-{safe}"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--memory-dir {config.memory_dir} cannot be used: {error.strerror}"
        ) from error
    return directory / "blocks", directory / "headers"


def _map(path: Path, nbytes: int) -> memoryview:
    try:
        return memoryview(map_file(path, nbytes))
    except OSError as error:
        raise ConfigError(f"{path} cannot be used: {error.strerror}") from error
