"""Tasks that plain functions begin, with an owner that awaits them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from baton.errors import InternalError

Result = TypeVar("Result")


class OwnedTasks:
    """Those that are begun while `run` is running. One that fails ends `run`, and so all others."""

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None

    @property
    def running(self) -> bool:
        """Whether more can be begun."""
        return self._group is not None

    async def run(self) -> None:
        """Until cancelled; then end them all."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                self._group = None

    def begin(self, work: Coroutine[Any, Any, Result], name: str) -> asyncio.Task[Result]:
        """Raises InternalError when nobody would await it."""
        if self._group is None:
            work.close()
            raise InternalError(f"nobody would await the task {name!r}: its owner is not running")
        return self._group.create_task(work, name=name)
