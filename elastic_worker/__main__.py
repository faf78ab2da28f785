"""`python -m elastic_worker --role prefill --conductor host:port [...]`"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from baton.config import option, parse_config
from baton.cpus import choose_placement
from baton.errors import ConfigError
from baton.types.fleet import Role
from baton.worker.config import WorkerConfig
from baton.worker.lifecycle import watch_parent


@dataclass(frozen=True, slots=True)
class ElasticConfig(WorkerConfig):
    """Of a worker that can change its role."""

    role: str = option("prefill", "what it begins as", choices=("prefill", "decode"))


def main() -> None:
    try:
        config = parse_config(ElasticConfig, sys.argv[1:], os.environ, "python -m elastic_worker")
        placement = choose_placement(config.cpus, config.threads)
    except ConfigError as error:
        sys.stderr.write(f"error: {error.message}\n")
        sys.exit(2)
    if config.exit_with_parent:
        watch_parent()
    placement.apply()
    # torch takes seconds to import: after the cheap ways to fail, and under the parent's watch.
    from baton.rpc.grpc_client import GrpcBlocksDialer, GrpcHandoffDialer
    from baton.worker.parts import WorkerParts
    from baton.worker.process import main as run
    from baton.worker.serving import cluster_token
    from decode_worker.service import DecodeService
    from prefill_worker.service import PrefillService

    def prefill(parts: WorkerParts) -> PrefillService:
        return PrefillService(parts, GrpcBlocksDialer(cluster_token()))

    def decode(parts: WorkerParts) -> DecodeService:
        token = cluster_token()
        return DecodeService(parts, GrpcHandoffDialer(token), GrpcBlocksDialer(token))

    run(config, Role(config.role), {Role.PREFILL: prefill, Role.DECODE: decode})


if __name__ == "__main__":
    main()
