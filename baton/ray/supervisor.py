"""Brings a cluster up on a Place, keeps it up, and takes it down, phase by phase.

start:  room for everything -> conductors (announce their ports) -> stores, workers -> ready
serve:  keepers restart what dies; pools follow the planner
stop:   drain (conductors finish their requests) -> stop workers and stores -> give room back
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from baton.errors import BatonError
from baton.ray.commands import Listening
from baton.ray.config import ClusterConfig
from baton.ray.crew import Crew
from baton.ray.keeper import Keeper, State
from baton.ray.place import Events, Place, StartFailed, sleep_unless
from baton.ray.placement import ELSEWHERE
from baton.ray.scale import Scaler, planner_says, wanted_of
from baton.stopping import Interrupted, Result, unless

_POLL_S = 0.5
_SAY_FIRST_S = 3.0
_SAY_S = 30.0  # between two lines about what is waited for
_CLOSE_GRACE_S = 5.0  # what a process may take beyond the drain that it does itself
_WORKER_GRACE_S = 20.0


class Asks(Protocol):
    """Conductors over HTTP, as any client sees them."""

    async def cluster(self, conductor: Listening) -> Mapping[str, Any]:
        """`GET /cluster`; empty when it does not answer."""

    async def ready(self, conductor: Listening) -> bool: ...


class Supervisor:
    """One cluster. `run` is called once; when it returns nothing of the cluster is left."""

    def __init__(self, config: ClusterConfig, place: Place, asks: Asks, events: Events) -> None:
        self._config = config
        self._place = place
        self._asks = asks
        self._events = events
        self._ready = False
        self._failure: BatonError | None = None
        self._stopping = asyncio.Event()  # by `stop` or a failure
        self._say_at: dict[str, float] = {}  # who waits for a place: when to say so next
        self._hurry = asyncio.Event()  # by a second `stop`: nothing is waited for any more

    def stop(self) -> None:
        """Let `run` drain, stop everything and return; the second time, at once."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def run(self, when_ready: Callable[[Sequence[Listening]], None]) -> None:
        """Until `stop`. Raises StartFailed when the cluster cannot be started or kept alive."""
        async with asyncio.TaskGroup() as group:
            crew = Crew(
                self._config,
                self._place,
                self._events,
                group,
                lambda keeper: self._given_up(crew, keeper),
                lambda: self._ready,
            )
            try:
                await self._unless_stopping(self._start(crew))
                self._ready = True
                when_ready(tuple(crew.listening.values()))
                await self._serve(crew, group)
            except Interrupted:
                pass
            except BatonError as error:
                self._fail(error)
            finally:
                await self._stop(crew)
        if self._failure is not None:
            raise self._failure

    async def _start(self, crew: Crew) -> None:
        await crew.reserve()
        await self._within(self._config.timeouts.place_s, crew.placed(), crew.unplaced, "placed")
        crew.start_conductors()

        async def silent() -> list[str]:
            return [f"{k.name} {k.why or 'does not listen'}" for k in crew.conductors.values()]

        start_s = self._config.timeouts.start_s
        await self._within(start_s, _set(crew.all_listen), silent, "listening")
        crew.start_workers()
        missing: set[str] = set()

        async def not_live() -> list[str]:
            return [_say(keeper) for keeper in crew.members if keeper.name in missing]

        await self._within(start_s, self._all_live(crew, missing), not_live, "ready")

    async def _within(
        self,
        limit_s: float,
        work: Awaitable[None],
        what_lacks: Callable[[], Awaitable[list[str]]],
        what: str,
    ) -> None:
        """Await `work`, saying now and then what lacks. Raises StartFailed after `limit_s`."""

        async def talk() -> None:
            pause_s = _SAY_FIRST_S
            while True:
                await asyncio.sleep(pause_s)
                pause_s = _SAY_S
                for line in await what_lacks():
                    self._events.event("waiting", f"waiting: {line}", what=line)

        talking = asyncio.create_task(talk(), name="waiting")
        try:
            async with asyncio.timeout(limit_s):
                await work
        except TimeoutError:
            text = "\n  ".join(await what_lacks() or [ELSEWHERE])
            raise StartFailed(f"not {what} after {limit_s:g} s:\n  {text}") from None
        finally:
            talking.cancel()
            await asyncio.gather(talking, return_exceptions=True)

    async def _all_live(self, crew: Crew, missing: set[str]) -> None:
        """Return once every conductor knows every worker as live and would serve a request."""
        for number in crew.listening:
            missing |= {keeper.name for keeper in crew.workers}
            while missing or not await self._asks.ready(crew.listening[number]):
                cluster = await self._asks.cluster(crew.listening[number])
                for worker in cluster.get("workers") or ():
                    if worker["state"] == "live":
                        missing.discard(worker["name"])
                await asyncio.sleep(_POLL_S)

    async def _serve(self, crew: Crew, group: asyncio.TaskGroup) -> None:
        """Until it is to stop; meanwhile the pools follow the planner."""
        config = self._config
        scalers = {
            name: Scaler(pool.least, pool.most, config.scale)
            for name, pool in config.pools.items()
            if pool.scales
        }
        while not await sleep_unless(self._stopping, config.scale.look_s):
            if scalers:
                await self._unless_stopping(self._scale(crew, scalers, group))
            await self._unless_stopping(self._say_who_waits(crew))

    async def _say_who_waits(self, crew: Crew) -> None:
        """Workers that were added, or whose node died, may have no room; say why, now and then."""
        now = asyncio.get_running_loop().time()
        self._say_at = {n: self._say_at.get(n, now + _SAY_FIRST_S) for n in crew.homeless}
        late = {name for name, at in self._say_at.items() if at <= now}
        reasons = await crew.why_homeless(late) if late else {}
        for name, line in reasons.items():
            self._events.event("waiting", f"waiting: {line}", name=name, what=line)
            self._say_at[name] = now + _SAY_S

    async def _scale(
        self, crew: Crew, scalers: Mapping[str, Scaler], group: asyncio.TaskGroup
    ) -> None:
        wanted = planner_says([await self._asks.cluster(each) for each in crew.listening.values()])
        if wanted is None:
            return
        now, sizes = asyncio.get_running_loop().time(), crew.sizes
        for name, scaler in scalers.items():
            pool, has = self._config.pools[name], sizes[name]
            size = scaler.size(has, wanted_of(self._config, pool, wanted, sizes), now)
            if size != has:
                text = f"{name}: {has} to {size} workers, as the planner wants {wanted}"
                self._events.event("scaling", text, name=name, before=has, after=size)
            for _ in range(size - has):
                await crew.add(name)
            for _ in range(has - size):
                leaving = crew.last(name)
                leaving.resign()  # so that it is counted no more
                grace_s = self._config.timeouts.drain_s + _CLOSE_GRACE_S
                group.create_task(self._leave(leaving, grace_s), name=f"{leaving.name} leaves")

    async def _leave(self, keeper: Keeper, grace_s: float) -> None:
        by_itself = await keeper.stop(grace_s, self._hurry)
        how = "has left" if by_itself else f"was killed: it had not drained after {grace_s:g} s"
        self._events.event("left", f"{keeper.name} {how}", name=keeper.name, killed=not by_itself)

    def _given_up(self, crew: Crew, keeper: Keeper) -> None:
        """The cluster goes on as long as it can answer; before it was ready, it never could."""
        conductors = [k for k in crew.conductors.values() if k.state is not State.GIVEN_UP]
        decode = sum(
            size for name, size in crew.sizes.items() if self._config.pools[name].role != "prefill"
        )
        if self._ready and conductors and decode:
            return
        tail = "".join(f"\n  {line}" for line in keeper.tail)
        what = f"{keeper.name} {keeper.why}{':' if tail else '; it wrote nothing'}{tail}"
        self._fail(StartFailed(what))

    async def _stop(self, crew: Crew) -> None:
        self._stopping.set()
        await crew.release()
        if self._ready and self._failure is None:
            self._events.event("draining", "draining: running requests finish", phase="drain")
        grace_s = 1.0 if self._failure else self._config.timeouts.drain_s + _CLOSE_GRACE_S
        killed = await self._stop_all(list(crew.conductors.values()), grace_s)
        self._events.event("stopping", "stopping the workers", phase="stop workers")
        # Nothing runs any more: what a worker does now is say farewell.
        killed += await self._stop_all([*crew.workers, *crew.stores], _WORKER_GRACE_S)
        text = f"stopped (killed: {', '.join(killed)})" if killed else "stopped"
        self._events.event("stopped", text, killed=killed)

    async def _stop_all(self, keepers: Sequence[Keeper], grace_s: float) -> list[str]:
        """Returns the names of those that had to be killed."""
        ended = await asyncio.gather(*(keeper.stop(grace_s, self._hurry) for keeper in keepers))
        return [k.name for k, by_itself in zip(keepers, ended, strict=True) if not by_itself]

    def _fail(self, error: BatonError) -> None:
        self._failure = self._failure or error
        self._stopping.set()

    async def _unless_stopping(self, work: Awaitable[Result]) -> Result:
        return await unless(self._stopping, work, lambda: self._failure)


def _say(keeper: Keeper) -> str:
    before = f"; before, it {keeper.why}" if keeper.why else ""
    return f"{keeper.name} is {keeper.state}{before}"


async def _set(event: asyncio.Event) -> None:
    await event.wait()
