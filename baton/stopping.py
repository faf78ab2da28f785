"""Work that is given up when a cluster is to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

Result = TypeVar("Result")


class Interrupted(Exception):
    """The cluster is to stop."""


async def unless(
    stopping: asyncio.Event, work: Awaitable[Result], failure: Callable[[], Exception | None]
) -> Result:
    """Await `work`. When the cluster is to stop, cancel it and raise the failure that is the reason
    for that, or Interrupted if there is none."""
    task = asyncio.ensure_future(work)
    stop = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if (failed := failure()) is not None:
            raise failed
        if not task.done():
            raise Interrupted
        return task.result()
    finally:
        task.cancel()
        stop.cancel()
        await asyncio.gather(task, stop, return_exceptions=True)
