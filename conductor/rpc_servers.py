"""The conductor's gRPC servers: one for everybody, and with TLS one beside it for its workers.

without TLS            grpc_port: Inference; Fleet behind the cluster's token
for clients            grpc_port: Inference, TLS    internal_port: Fleet, behind the token
between the processes  grpc_port: Inference         internal_port: Fleet, behind token, certificate

gRPC asks everybody at a port for a certificate, or nobody: clients have none. And workers that
speak no TLS have no use for a certificate that is for clients.
"""

from __future__ import annotations

import asyncio

from baton.rpc.grpc_server import RpcServer
from baton.rpc.tls import Certificates, FrontCertificate
from conductor.config import ConductorConfig
from conductor.grpc_inference import SERVICE_NAME, add_inference
from conductor.service import Conductor


class RpcServers:
    """`start` them, then `stop` them. Make it inside the running event loop."""

    def __init__(
        self,
        config: ConductorConfig,
        conductor: Conductor,
        token: str,
        certificates: Certificates | None,
        front: FrontCertificate | None,
    ) -> None:
        host = config.grpc_host or config.host
        address = f"{host}:{config.grpc_port}"
        self._public = RpcServer(address, token, reflect=(SERVICE_NAME,), tls=front)
        self._all = [self._public]
        add_inference(self._public.grpc, conductor, config.max_body_bytes)
        if certificates is not None or front is not None:
            self._all.append(RpcServer(f"{host}:{config.internal_port}", token, tls=certificates))
        self._all[-1].add_fleet(conductor.fleet)

    async def start(self) -> tuple[str, str]:
        """Addresses that were bound: for clients, and for workers (without TLS, it is the same).
        Raises ConfigError."""
        bound = [await server.start() for server in self._all]
        return bound[0], bound[-1]

    async def set_ready(self, ready: bool) -> None:
        for server in self._all:
            await server.set_ready(ready)

    async def stop(self, grace_s: float) -> None:
        await asyncio.gather(*(server.stop(grace_s) for server in self._all))
