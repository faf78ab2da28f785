"""A prefill service whose peers are reached over gRPC."""

from __future__ import annotations

from baton.rpc.grpc_client import GrpcBlocksDialer
from baton.worker.parts import WorkerParts
from baton.worker.serving import cluster_token
from prefill_worker.service import PrefillService


def over_grpc(parts: WorkerParts) -> PrefillService:
    return PrefillService(parts, GrpcBlocksDialer(cluster_token(), parts.tls))
