"""Which of a conductor's gRPC ports is for whom, by the certificates that it has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from baton.errors import BatonError
from baton.rpc.grpc_client import GrpcFleetClient
from baton.rpc.tls import Certificates, FrontCertificate, TlsConfig
from baton.types.fleet import Role
from conductor.config import ConductorConfig
from conductor.rpc_servers import RpcServers
from tests.certificates import Authority
from tests.fake_worker import fake_cluster, worker_info

TOKEN = "secret"


@asynccontextmanager
async def ports(
    certificates: Certificates | None, front: FrontCertificate | None
) -> AsyncIterator[tuple[str, str]]:
    """For clients, and for workers."""
    async with fake_cluster(prefill=0, decode=0) as cluster:
        config = ConductorConfig(grpc_port=0)
        servers = RpcServers(config, cluster.conductor, TOKEN, certificates, front)
        try:
            yield await servers.start()
        finally:
            await servers.stop(0.1)


async def admits(address: str, tls: Certificates | None, token: str = TOKEN) -> bool:
    """Whether a worker can register there."""
    client = GrpcFleetClient(address, token, tls=tls)
    try:
        await client.register(worker_info("prefill-0", Role.PREFILL))
    except BatonError:
        return False
    finally:
        await client.aclose()
    return True


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("clients", [False, True])
async def test_workers_get_in_where_they_are_told_and_nowhere_else(
    tmp_path: Path, between: bool, clients: bool
) -> None:
    authority = Authority(tmp_path)
    pair, shown = authority.issue("baton"), authority.issue("localhost")
    config = TlsConfig(str(pair.cert), str(pair.key), str(authority.ca))
    certificates = Certificates(config) if between else None
    front = FrontCertificate(str(shown.cert), str(shown.key)) if clients else None
    async with ports(certificates, front) as (public, for_workers):
        assert await admits(for_workers, certificates)
        assert not await admits(for_workers, certificates, token="wrong")
        assert (public == for_workers) is not (between or clients)
        if public != for_workers:
            assert not await admits(public, certificates)
            assert not await admits(public, None)
        if between:
            assert not await admits(for_workers, None)
