"""`python -m kvstore --conductor host:port [...]`: the KV store of one node."""

from __future__ import annotations

import asyncio

from baton.types.fleet import Role
from baton.worker.lifecycle import StopSignals
from baton.worker.member_metrics import MemberMetrics
from baton.worker.serving import CLOSE_TIMEOUT_S, Place, begun, run_process, serve
from baton.worker.start import configured
from kvstore.build import StoreParts, build, store_name
from kvstore.config import StoreConfig


def main() -> None:
    config = configured(StoreConfig, "python -m kvstore")
    run_process(store_name(config), config.log_level, _run(config))


async def _run(config: StoreConfig) -> None:
    metrics = MemberMetrics("store")
    async with begun(config, metrics) as (place, signals):
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
