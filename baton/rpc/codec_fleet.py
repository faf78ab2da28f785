"""Codec of what baton/types/fleet.py defines."""

from __future__ import annotations

from baton.errors import InternalError
from baton.rpc.codec_figures import offers_from_pb, offers_to_pb, store_from_pb, store_to_pb
from baton.types.fleet import BlockState, FleetLease, KvLayout, Peer, Role, WorkerInfo, WorkerLoad
from baton.v1 import common_pb2 as common
from baton.v1 import fleet_pb2 as pb

_STATES = {
    BlockState.FREE: common.BLOCK_STATE_FREE,
    BlockState.ACTIVE: common.BLOCK_STATE_ACTIVE,
    BlockState.CACHED: common.BLOCK_STATE_CACHED,
    BlockState.LEASED: common.BLOCK_STATE_LEASED,
    BlockState.QUARANTINED: common.BLOCK_STATE_QUARANTINED,
}
_STATES_BACK = {number: state for state, number in _STATES.items()}
_ROLES = {
    Role.PREFILL: pb.ROLE_PREFILL,
    Role.DECODE: pb.ROLE_DECODE,
    Role.STORE: pb.ROLE_STORE,
}
_ROLES_BACK = {number: role for role, number in _ROLES.items()}


def layout_to_pb(value: KvLayout) -> common.KvLayout:
    return common.KvLayout(
        model=value.model,
        dtype=value.dtype,
        num_layers=value.num_layers,
        kv_heads=value.kv_heads,
        head_dim=value.head_dim,
        block_size=value.block_size,
        quantization=value.quantization,
    )


def layout_from_pb(message: common.KvLayout) -> KvLayout:
    return KvLayout(
        model=message.model,
        dtype=message.dtype,
        num_layers=message.num_layers,
        kv_heads=message.kv_heads,
        head_dim=message.head_dim,
        block_size=message.block_size,
        quantization=message.quantization,
    )


def load_to_pb(value: WorkerLoad) -> common.WorkerLoad:
    return common.WorkerLoad(
        running=value.running,
        waiting=value.waiting,
        waiting_tokens=value.waiting_tokens,
        blocks=[
            common.BlockCount(state=_STATES[state], count=count) for state, count in value.blocks
        ],
        offers=None if value.offers is None else offers_to_pb(value.offers),
        store=None if value.store is None else store_to_pb(value.store),
    )


def load_from_pb(message: common.WorkerLoad) -> WorkerLoad:
    return WorkerLoad(
        running=message.running,
        waiting=message.waiting,
        waiting_tokens=message.waiting_tokens,
        blocks=tuple((_state_from_pb(item.state), item.count) for item in message.blocks),
        offers=offers_from_pb(message.offers) if message.HasField("offers") else None,
        store=store_from_pb(message.store) if message.HasField("store") else None,
    )


def _state_from_pb(number: common.BlockState) -> BlockState:
    try:
        return _STATES_BACK[number]
    except KeyError:
        raise InternalError(
            f"a peer sent block state {number}, which this version does not know; "
            "run the same version of baton everywhere"
        ) from None


def peer_to_pb(value: Peer) -> common.Peer:
    return common.Peer(name=value.name, incarnation=value.incarnation, address=value.address)


def peer_from_pb(message: common.Peer) -> Peer:
    return Peer(message.name, message.incarnation, message.address)


def info_to_pb(value: WorkerInfo) -> pb.WorkerInfo:
    return pb.WorkerInfo(
        name=value.name,
        role=_ROLES[value.role],
        incarnation=value.incarnation,
        address=value.address,
        pid=value.pid,
        model_name=value.model_name,
        layout=layout_to_pb(value.layout),
        num_blocks=value.num_blocks,
        max_model_len=value.max_model_len,
        transport=value.transport,
        device=value.device,
        cpus=value.cpus,
        threads=value.threads,
        node=value.node,
        protocol=value.protocol,
        version=value.version,
        roles=[role_to_pb(role) for role in value.roles],
        pair_to_token=value.pair_to_token,
        step_tokens=value.step_tokens,
    )


def info_from_pb(message: pb.WorkerInfo) -> WorkerInfo:
    return WorkerInfo(
        name=message.name,
        role=role_from_pb(message.role),
        incarnation=message.incarnation,
        address=message.address,
        pid=message.pid,
        model_name=message.model_name,
        layout=layout_from_pb(message.layout),
        num_blocks=message.num_blocks,
        max_model_len=message.max_model_len,
        transport=message.transport,
        device=message.device,
        cpus=message.cpus,
        threads=message.threads,
        node=message.node,
        protocol=message.protocol,
        version=message.version,
        roles=tuple(role_from_pb(role) for role in message.roles),
        pair_to_token=message.pair_to_token,
        step_tokens=message.step_tokens,
    )


def role_to_pb(value: Role) -> pb.Role:
    return _ROLES[value]


def role_from_pb(number: pb.Role) -> Role:
    try:
        return _ROLES_BACK[number]
    except KeyError:
        raise InternalError(
            f"a peer named role {number}, which this version does not know; "
            "run the same version of baton everywhere"
        ) from None


def lease_to_pb(value: FleetLease) -> pb.FleetLease:
    return pb.FleetLease(accepted=value.accepted, ttl_s=value.ttl_s)


def lease_from_pb(message: pb.FleetLease) -> FleetLease:
    return FleetLease(message.accepted, message.ttl_s)
