"""`python -m decode_worker --conductor host:port [...]`"""

from __future__ import annotations

import os
import sys

from baton.config import parse_config
from baton.cpus import choose_placement
from baton.errors import ConfigError
from baton.types.fleet import Role
from baton.worker.config import WorkerConfig
from baton.worker.lifecycle import watch_parent


def main() -> None:
    try:
        config = parse_config(WorkerConfig, sys.argv[1:], os.environ, "python -m decode_worker")
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

    def make(parts: WorkerParts) -> DecodeService:
        token = cluster_token()
        return DecodeService(parts, GrpcHandoffDialer(token), GrpcBlocksDialer(token))

    run(config, Role.DECODE, {Role.DECODE: make})


if __name__ == "__main__":
    main()
