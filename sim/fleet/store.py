"""A node's KV store without bytes: the production store over slots of a few bytes each.

What is read from it and into it takes the time of whole blocks, because transfers are counted by
the layout.
"""

from __future__ import annotations

from baton.kv.blocks.options import BlocksOptions
from baton.kv.digest import Verify
from baton.kv.identity import Identity
from baton.kv.transport.shared import SharedTransport
from baton.types.fleet import Role, WorkerInfo
from baton.types.kv_events import Tier
from kvstore.eviction import make_policy
from kvstore.format import fingerprint
from kvstore.journal import Journal
from kvstore.loads import LoadOptions
from kvstore.memory_tier import MemoryTier
from kvstore.service import StoreService
from kvstore.slot_table import HEADER_BYTES, SlotTable
from kvstore.store import Store, StoreOptions
from sim.fleet.nvme import SLOT_BYTES, Carry, make_disk
from sim.fleet.transport import ModelledTransport
from sim.steps import ModelledThreads

TELL_S = 1.0  # how old the news may be that the conductor has


async def make_store(
    identity: Identity,
    transport: ModelledTransport,
    slots: int,
    eviction: str,
    lease_ttl_s: float,
    nvme_blocks: int,
    carry: Carry,
) -> tuple[Store, StoreService]:
    """An open store of so many blocks, with an NVMe tier if that is to have any; who closes the
    service closes the store, too."""
    layout = identity.layout
    memory = transport.allocate(slots * layout.block_bytes)
    headers = memoryview(bytearray(slots * HEADER_BYTES))
    table = SlotTable(headers, fingerprint(layout), SLOT_BYTES)
    journal = Journal()
    payload = memoryview(bytearray(slots * SLOT_BYTES))
    changes = journal.of(Tier.CPU)
    tier = MemoryTier(payload, table, SLOT_BYTES, make_policy(eviction), changes)
    disk = make_disk(nvme_blocks, journal.of(Tier.NVME), carry) if nvme_blocks else None
    one_by_one = StoreOptions(loads=LoadOptions(batch_bytes=SLOT_BYTES))
    store = Store(tier, disk, journal, one_by_one, threads=ModelledThreads(0.0))
    await store.open()
    options = BlocksOptions(lease_ttl_s=lease_ttl_s, verify=Verify.OFF)
    shared = SharedTransport(transport)
    return store, StoreService(store, tier, identity, shared, memory, options, TELL_S)


def store_info(identity: Identity, model: str, node: str, slots: int) -> WorkerInfo:
    """The registration."""
    return WorkerInfo(
        name=identity.name,
        role=Role.STORE,
        incarnation=identity.incarnation,
        address=identity.name,
        pid=0,
        model_name=model,
        layout=identity.layout,
        num_blocks=slots,
        max_model_len=0,
        transport=ModelledTransport.name,
        node=node,
    )
