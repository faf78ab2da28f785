"""`python -m kvstore --conductor host:port [...]`: the KV store of one node."""

from __future__ import annotations

import asyncio
import os
import sys

from baton.config import parse_config
from baton.errors import ConfigError
from baton.types.fleet import Role
from baton.worker.lifecycle import StopSignals, watch_parent
from baton.worker.member_metrics import MemberMetrics
from baton.worker.monitor import monitored
from baton.worker.serving import (
    CLOSE_TIMEOUT_S,
    Place,
    cluster_token,
    find_registry,
    run_process,
    serve,
)
from kvstore.build import StoreParts, build, store_name
from kvstore.config import StoreConfig


def main() -> None:
    try:
        config = parse_config(StoreConfig, sys.argv[1:], os.environ, "python -m kvstore")
    except ConfigError as error:
        sys.stderr.write(f"error: {error.message}\n")
        sys.exit(2)
    if config.exit_with_parent:
        watch_parent()
    run_process(store_name(config), config.log_level, _run(config))


async def _run(config: StoreConfig) -> None:
    place = Place(
        config.conductor,
        find_registry(config.conductor, config.redis_options),
        config.listen,
        config.advertise,
        config.drain_timeout,
        config.open_certificates(),
        config.health_listen,
    )
    cluster_token()
    signals = StopSignals()
    signals.install()
    metrics = MemberMetrics("store")
    async with monitored(
        config.listen, config.metrics_port, metrics.own.render_for, metrics.loop_lag
    ):
        await _serve(place, await build(config), metrics, signals)


async def _serve(
    place: Place,
    parts: StoreParts,
    metrics: MemberMetrics,
    signals: StopSignals,
) -> None:
    try:
        service = parts.make_service(metrics)
        metrics.follow(parts.identity, Role.STORE, service.load)
        await serve(place, parts.info, service, signals)
        await parts.store.settle()
        parts.store.check_integrity()  # nobody reads or writes any more: the books must agree
    finally:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await place.aclose()
            await parts.close()


if __name__ == "__main__":
    main()
