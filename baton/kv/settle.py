"""How reads of a peer's memory come to an end when they are given up.

Local blocks may be used for something else only when no transfer can write into them any more. That
is waited for whatever happens meanwhile, and never without end: a peer that does not help its
reads on is cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from baton.errors import TransportError
from baton.kv.transport.base import Transfer

T = TypeVar("T")


async def until_idle(transfers: Iterable[Transfer]) -> None:
    """Abort all; return when none of them writes into local memory any more."""
    await asyncio.gather(*(transfer.abort() for transfer in transfers))


async def settle(
    transfers: Iterable[Transfer], linger_s: float, cut: Callable[[], Awaitable[None]]
) -> bool:
    """As `until_idle`; when that takes more than `linger_s` seconds, `cut` must end the connection,
    and with it every read from the peer. False when it came to that."""
    transfers = tuple(transfers)
    try:
        async with asyncio.timeout(linger_s):
            await until_idle(transfers)
    except TimeoutError:
        await cut()
        await until_idle(transfers)
        return False
    return True


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which goes on to its end even when the caller is cancelled; then the
    cancellation is raised after it. `work` must have deadlines of its own."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()


def raise_if_cancelled() -> None:
    """Raise the cancellation of this task that a task group has kept to itself: one that comes
    while the group ends because of an error is not raised again (until Python 3.13)."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def verdict(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that says most: when a stream breaks, transfers fail too, but only as a result."""
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.append(verdict(error) if isinstance(error, BaseExceptionGroup) else error)
    causes = [error for error in leaves if type(error) is not TransportError]
    return (causes or leaves)[0]
