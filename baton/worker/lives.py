"""The lives of one worker, one role after the other: what processes and the simulator share.

    a life as prefill worker -> ... SetRole ... -> a life as decode worker -> ... -> the stop signal

A worker that can do several duties keeps weights and memory from one life to the next. Everything
else is new, the incarnation too: for the others it is a worker that was restarted very quickly.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from baton.kv.identity import new_incarnation
from baton.types.fleet import Role, WorkerInfo
from baton.worker.parts import WorkerParts
from baton.worker.serving import Service

Make = Callable[[WorkerParts], Service]
Serve = Callable[[Callable[[str], WorkerInfo], Service], Awaitable[Role | None]]
"""One life: from the registration, made of the address, to its end. Returns the next role."""


async def live_on(
    parts: WorkerParts,
    role: Role,
    makes: Mapping[Role, Make],
    serve: Serve,
    name_life: Callable[[], str] = new_incarnation,
) -> None:
    """From the first life, as `role`, to the end of the last. `makes` has what the worker can be;
    `name_life` is asked before each life but the first."""
    roles = tuple(makes) if len(makes) > 1 else ()
    life: Role | None = role
    while life is not None:
        service = makes[life](parts)
        parts.metrics.follow(parts.identity, life, service.load)
        service.links.other_roles = frozenset(roles) - {life}
        life = await serve(partial(parts.info, life, roles=roles), service)
        parts = parts.reborn(name_life())
