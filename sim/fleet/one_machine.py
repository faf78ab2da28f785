"""A whole cluster on the cores of one machine, as `baton serve` places it: what computes, shares.

Steps of workers run on the worker's core. What conductor and clients do (the front) runs where
`baton serve` puts the conductor, and a handoff on the core of the worker that decodes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from baton.cli.plan import place_conductor, place_workers
from baton.cli.serve_options import ServeOptions
from baton.cpus import parse_cpus
from sim.costs.cores import Cores, Kind
from sim.costs.serving import BLOCK_TOKENS, Serving


class OneMachine:
    """Workers are p0, p1, ... and d0, d1, ...; each computes on the first of its cores."""

    def __init__(self, serving: Serving, prefill: int, decode: int) -> None:
        self._overheads = serving.overheads
        self._told_at = -1.0  # when tokens came last
        self._cores = Cores(serving.cores, serving.beside)
        options = ServeOptions(prefill=prefill, decode=decode, colocated=not prefill)
        placed = place_workers(options, range(serving.cores))
        names = [f"p{n}" for n in range(prefill)]
        names += [f"{'d' if prefill else 'm'}{n}" for n in range(decode)]
        self._core_of = {
            name: parse_cpus(cpus)[0] for name, (_, _, cpus) in zip(names, placed, strict=True)
        }
        conductor = place_conductor(placed)
        self._front = parse_cpus(conductor) if conductor else tuple(range(serving.cores))

    def step(self, worker: str, kind: Kind, seconds: float, done: Callable[[], object]) -> None:
        self._cores.run(self._core_of[worker], kind, seconds, done)

    async def ask(self, tokens: int) -> None:
        """A request on its way to a worker, with a prompt of so many tokens."""
        more = self._overheads
        await self._cores.work(self._front, Kind.FRONT, more.ask_s + more.ask_token_s * tokens)
        await asyncio.sleep(more.ask_wait_s)

    async def tell(self, tokens: int) -> None:
        """So many tokens on their way to their client. What comes at one moment is one report."""
        now, more = asyncio.get_running_loop().time(), self._overheads
        report_s = more.tell_s if now > self._told_at else 0.0
        self._told_at = now
        await self._cores.work(self._front, Kind.FRONT, report_s + more.tell_token_s * tokens)

    async def hand_over(self, source: str, worker: str, tokens: float) -> None:
        """KV of so many tokens on its way from one worker to another."""
        more = self._overheads
        if more.lend_s > 0:
            self._cores.run(self._core_of[source], Kind.FRONT, more.lend_s, lambda: None)
        seconds = more.handoff_s + more.handoff_block_s * tokens / BLOCK_TOKENS
        await self._cores.work((self._core_of[worker],), Kind.FRONT, seconds)
        await asyncio.sleep(more.handoff_wait_s)
