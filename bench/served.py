"""A cluster of `baton serve` for as long as a benchmark needs it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from baton.cli.plan import new_environ

_START_S = 300.0
_STOP_S = 60.0


@asynccontextmanager
async def served(arguments: Sequence[str]) -> AsyncIterator[dict[str, Any]]:
    """On ports of its own; gives its `ready` event, which has `http` and `model`. Exits with a
    sentence when it does not start."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "baton.cli.main", "serve", *arguments),
        *("--json", "--port", "0", "--grpc-port", "0"),
        stdout=asyncio.subprocess.PIPE,
        env=new_environ(),
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_S):
            async for line in process.stdout:
                event: dict[str, Any] = json.loads(line)
                if event["event"] == "ready":
                    break
            else:
                raise SystemExit("the cluster did not start")
        yield event
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
