"""Tasks that plain functions begin end with their owner."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import InternalError
from baton.tasks import OwnedTasks
from tests.virtual_time import settle, virtual_time


@virtual_time
async def test_tasks_end_before_their_owner() -> None:
    owned, ends = OwnedTasks(), []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(1)
            ends.append("work")

    owner = asyncio.create_task(owned.run())
    await settle()
    owned.begin(work(), "work")
    await settle()
    owner.cancel()
    await asyncio.wait([owner])
    assert ends == ["work"]
    assert not owned.running


@virtual_time
async def test_what_nobody_would_await_is_not_begun() -> None:
    owned = OwnedTasks()

    async def work() -> None:
        raise AssertionError("begun")

    async def run_and_end() -> None:
        owner = asyncio.create_task(owned.run())
        await settle()
        assert owned.running
        owner.cancel()
        await asyncio.wait([owner])

    with pytest.raises(InternalError, match="'work'"):
        owned.begin(work(), "work")
    await run_and_end()
    with pytest.raises(InternalError, match="'work'"):
        owned.begin(work(), "work")


@virtual_time
async def test_one_that_fails_ends_all() -> None:
    owned = OwnedTasks()

    async def fail() -> None:
        raise ValueError("a bug")

    owner = asyncio.create_task(owned.run())
    await settle()
    other = owned.begin(asyncio.Event().wait(), "other")
    owned.begin(fail(), "fail")
    with pytest.raises(ExceptionGroup) as failed:
        await owner
    assert failed.group_contains(ValueError)
    assert other.cancelled()
