"""The Ray actor that runs one process of the cluster as its child, and relays its log.

Ray places the actor and gives it what it asked for, such as GPUs (CUDA_VISIBLE_DEVICES); the child
inherits that. Tokens and KV go from child to child and never through Ray. When the actor ends, for
whatever reason, the child's standard input ends, and the child ends itself.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

import ray

from baton.child import Child, ChildSpec


class ProcessActor:
    """One process at a time, started again with `run`. Wrapped by Ray in `ray_place.py`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._child: Child | None = None
        self._never = asyncio.Event()

    def __repr__(self) -> str:
        """Ray puts this in front of each line that it relays to the driver."""
        return self._name

    async def node_id(self) -> str:
        """Of the node that this runs on."""
        return str(ray.get_runtime_context().get_node_id())

    async def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    async def run(self, args: tuple[str, ...], environ: Mapping[str, str]) -> tuple[int, list[str]]:
        """Until the process ends: its exit code and last lines."""
        argv = (sys.executable, "-m", *args)
        self._child = Child(ChildSpec(self._name, argv, {**os.environ, **environ}), _log)
        code = await self._child.run()
        return code, list(self._child.tail)

    async def announcement(self, timeout_s: float) -> dict[str, Any]:
        """Raises TimeoutError."""
        if self._child is None:
            raise RuntimeError(f"{self._name} was not started")
        return await self._child.announcement(timeout_s)

    async def stop(self, grace_s: float) -> None:
        if self._child is not None:
            await self._child.stop(grace_s, self._never)


def _log(_name: str, line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
