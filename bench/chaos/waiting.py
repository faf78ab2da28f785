"""Waiting for something that can only be looked at."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

POLL_S = 0.1


async def until(
    condition: Callable[[], Awaitable[bool]], within_s: float, poll_s: float = POLL_S
) -> bool:
    """Look again and again; whether it came true in time."""
    try:
        async with asyncio.timeout(within_s):
            while not await condition():  # noqa: ASYNC110 - nobody would set an event
                await asyncio.sleep(poll_s)
    except TimeoutError:
        return False
    return True
