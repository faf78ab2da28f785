"""A decode service whose peers are reached over gRPC."""

from __future__ import annotations

from baton.rpc.grpc_client import GrpcBlocksDialer, GrpcHandoffDialer
from baton.worker.parts import WorkerParts
from baton.worker.serving import cluster_token
from decode_worker.service import DecodeService


def over_grpc(parts: WorkerParts) -> DecodeService:
    token = cluster_token()
    handoffs, blocks = GrpcHandoffDialer(token, parts.tls), GrpcBlocksDialer(token, parts.tls)
    return DecodeService(parts, handoffs, blocks)
